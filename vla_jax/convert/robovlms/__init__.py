"""RoboVLMs' checkpoints and configs."""
