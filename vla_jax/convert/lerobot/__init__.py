"""LeRobot's SmolVLA: names and files. Its pi0 and pi0.5 have openpi's names."""
