"""Where everything stands on the table, and how far things reach.

Frame: x to the right, y away from the static camera, z up; the origin is the middle of the table
top. Meters and radians throughout.
"""

from __future__ import annotations

COLOURS = ("red", "green", "blue")
SIDES = ("left", "right")

TABLE_HALF = (0.36, 0.28)  # a rim stands on this edge, so nothing can leave the table

# Blocks are cubes. For sideways contact they count as discs (rotation does not matter then);
# the disc's area is about the cube's.
BLOCK_HALF = 0.03
BLOCK_RADIUS = 0.033
BLOCK_LOW = (-0.32, -0.24)  # block centers never leave this rectangle: rim and fixture ledge
BLOCK_HIGH = (0.32, 0.12)
# Block centers at reset: between the pads, each color in a lane of its own. A policy trained from
# scratch for minutes learns which lane a word means long before it learns to see colors.
LANES = {"red": -0.11, "green": 0.0, "blue": 0.11}  # x of the lane's middle
SPAWN_LOW = (-0.03, -0.21)  # x from the lane's middle, y
SPAWN_HIGH = (0.03, 0.07)
SPAWN_GAP = 0.12  # smallest distance of two centers at reset: an open gripper fits around each
SPAWN_YAW = 0.15

PADS = {"left": (-0.25, -0.07), "right": (0.25, -0.07)}
PAD_HALF = 0.075

BUTTON = (-0.24, 0.20)
BUTTON_HALF = 0.035
BUTTON_TOP = 0.04  # cap height when nobody presses
BUTTON_TRAVEL = 0.025
BUTTON_TRIP = 0.012  # depth at which the LED toggles; it arms again on the way up
LED = (-0.12, 0.21)
LED_HALF = 0.03
LED_TOP = 0.035

RAIL_Y = 0.20
RAIL_LEFT, RAIL_RIGHT = 0.04, 0.28  # travel of the knob's center
KNOB_HALF = (0.03, 0.018)  # as wide as a block: the fingers close on it in one step
KNOB_TOP = 0.06

# The tool point is the middle between the two fingertips. Fingers open along the tool's x axis.
FINGER_HALF = (0.006, 0.012, 0.045)
FINGER_RADIUS = 0.003  # for pushing: a gripped block is just touched
APERTURE_OPEN = 0.12  # meters between the fingers' inner faces
APERTURE_RATE = 0.06  # meters a control step
GRASP_ALONG = 0.028  # how far the center of what is gripped may be off the line between the fingers
TOOL_LOW = (-0.33, -0.25, 0.012)
TOOL_HIGH = (0.33, 0.24, 0.30)
TOOL_SPAWN_LOW = (-0.15, -0.15, 0.14)
TOOL_SPAWN_HIGH = (0.15, 0.10, 0.22)

ACTION_SCALE = 0.04  # meters a unit of action[0:3]
YAW_SCALE = 0.1  # radians a unit of action[5]
