"""LeRobot's SmolVLA, pi0 and pi0.5: names and files. The latter two have openpi's names."""
