"""Units of actions and states: statistics, normalization, the gripper."""
