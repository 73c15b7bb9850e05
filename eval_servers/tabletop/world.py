"""The tabletop's state and its dynamics, without pixels.

Kinematic, no velocities: the tool goes where the action says unless something solid is in the
way; a block between closing fingers is gripped, squared up and carried; fingers push blocks and
the knob; what is let go falls. See `contact` for the rules between bodies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval_servers.tabletop import contact
from eval_servers.tabletop.layout import (
    ACTION_SCALE,
    APERTURE_OPEN,
    APERTURE_RATE,
    BLOCK_HALF,
    BLOCK_HIGH,
    BLOCK_LOW,
    BUTTON,
    BUTTON_HALF,
    BUTTON_TOP,
    BUTTON_TRAVEL,
    BUTTON_TRIP,
    COLOURS,
    FINGER_HALF,
    FINGER_RADIUS,
    GRASP_ALONG,
    KNOB_HALF,
    KNOB_TOP,
    RAIL_LEFT,
    RAIL_RIGHT,
    RAIL_Y,
    TOOL_HIGH,
    TOOL_LOW,
    YAW_SCALE,
)

NOTHING = -1
KNOB = len(COLOURS)  # "held" index of the slider's knob, after the blocks
HOLDABLE = tuple(f"{c}_block" for c in COLOURS) + ("slider",)


def parse_action(action: Any) -> np.ndarray:
    """Check one action and return it as float64 [7], the arm clipped to [-1, 1].

    Raises:
        ValueError: naming everything that is wrong with it.
    """
    try:
        a = np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"action must be 7 numbers, got {action!r}") from error
    if a.shape != (7,):
        raise ValueError(
            f"action must have shape (7,) = x, y, z, roll, pitch, yaw, gripper; got {a.shape}"
        )
    problems = []
    if not np.isfinite(a).all():
        problems.append(f"not finite at {np.flatnonzero(~np.isfinite(a)).tolist()}")
    if a[6] not in (-1.0, 1.0):
        problems.append(f"gripper (action[6]) must be -1 (close) or +1 (open), is {a[6]}")
    if problems:
        raise ValueError("bad action: " + "; ".join(problems))
    return np.append(np.clip(a[:6], -1.0, 1.0), a[6])


def rotate(vector, angle):
    """Turn a plane vector [2] by `angle` radians, counter-clockwise."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1]])


class World:
    """State and dynamics of the table.

    Args:
        conditions: what `tasks.initial_conditions` returns: "blocks" {color: (x, y, yaw)},
            "slider" (0 = left end, 1 = right end), "led" (bool), "tool" (x, y, z).
    """

    def __init__(self, conditions: dict[str, Any]):
        self.blocks = np.array([[*conditions["blocks"][c][:2], BLOCK_HALF] for c in COLOURS])
        self.yaw = np.array([conditions["blocks"][c][2] for c in COLOURS], dtype=float)
        self.grasps = [0] * len(COLOURS)
        self.knob = RAIL_LEFT + float(conditions["slider"]) * (RAIL_RIGHT - RAIL_LEFT)
        self.led = bool(conditions["led"])
        # Meters the button is pressed, and whether the next press toggles the LED.
        self.depth, self.armed = 0.0, True
        self.tool = np.array(conditions["tool"], dtype=float)
        self.tool_yaw = 0.0
        self.aperture = APERTURE_OPEN
        self.command = 1
        self.held = NOTHING
        self.grip = np.zeros(4)  # held block in the tool frame: x, y, z, yaw

    def step(self, action: Any) -> None:
        """Advance one control step.

        Args:
            action: [7] x, y, z in `ACTION_SCALE` meters a unit and roll, pitch (ignored: the tool
                always points down), yaw in `YAW_SCALE` radians a unit, each in [-1, 1] and
                clipped to it; gripper -1 close or +1 open.

        Raises:
            ValueError: if the action is not seven finite numbers or the gripper not -1 or +1.
        """
        a = parse_action(action)
        dx, dy, dz = a[:3] * ACTION_SCALE
        if self.held == KNOB:
            self._slide(dx)
        else:
            # Up first, or down last: the way a hand clears an edge.
            if dz > 0:
                self._lift(dz)
            self._shift(dx, dy, a[5] * YAW_SCALE)
            if dz <= 0:
                self._lift(dz)
        self._fingers(int(a[6]))
        self._fall()
        self._press()

    def get_info(self) -> dict[str, Any]:
        """A copy of the state: nested dicts of floats, ints, bools, strings and lists.

        `robot_info`: `tcp_pos` [3] and `tcp_orn` [3] (roll, pitch, yaw) of the tool point,
        `gripper_opening_width` in meters, `gripper_action` (last command, -1 or +1), `held`
        (an entry of `HOLDABLE` or None).
        `scene_info`: `blocks` {color: `pos` [3] of the center, `yaw`, `held`, `grasps` (times
        gripped since the reset), `support` ("table", a color or "gripper")}, `slider` (0 = left
        end, 1 = right end), `led`, `button` (depth in meters).
        """
        blocks, spots = {}, self.blocks.tolist()
        for i, colour in enumerate(COLOURS):
            below = contact.support(spots, i)
            blocks[colour] = {
                "pos": spots[i],
                "yaw": float(self.yaw[i]),
                "held": self.held == i,
                "grasps": self.grasps[i],
                "support": "gripper"
                if self.held == i
                else ("table" if below < 0 else COLOURS[below]),
            }
        return {
            "robot_info": {
                "tcp_pos": self.tool.tolist(),
                "tcp_orn": [0.0, 0.0, float(self.tool_yaw)],
                "gripper_opening_width": float(self.aperture),
                "gripper_action": self.command,
                "held": None if self.held == NOTHING else HOLDABLE[self.held],
            },
            "scene_info": {
                "blocks": blocks,
                "slider": float((self.knob - RAIL_LEFT) / (RAIL_RIGHT - RAIL_LEFT)),
                "led": self.led,
                "button": float(self.depth),
            },
        }

    def _free(self):
        return [i for i in range(len(COLOURS)) if i != self.held]

    def _riders(self):
        """Blocks standing on the held one, which travel with it."""
        # Filled from below: a block rides if what it stands on does.
        riders = []
        if 0 <= self.held < KNOB:
            spots = self.blocks.tolist()
            below = [contact.support(spots, i) for i in range(len(COLOURS))]
            # Lowest first, so that a stack is followed block by block.
            for i in sorted(self._free(), key=lambda k: self.blocks[k, 2]):
                rests = abs(self.blocks[i, 2] - self.blocks[below[i], 2] - 2 * BLOCK_HALF) < 1e-6
                if below[i] >= 0 and rests and (below[i] == self.held or below[i] in riders):
                    riders.append(i)
        return riders

    def _finger_tips(self):
        arm = rotate((self.aperture / 2 + FINGER_HALF[0], 0.0), self.tool_yaw)
        return [(self.tool[:2] - arm).tolist(), (self.tool[:2] + arm).tolist()]

    def _discs(self):
        tip = float(self.tool[2])
        # Fingers reach up without end: the hand is above them and nothing fits below it.
        discs = [contact.Disc(x, y, FINGER_RADIUS, tip, np.inf) for x, y in self._finger_tips()]
        if 0 <= self.held < KNOB:
            discs.append(contact.as_disc(self.blocks[self.held].tolist()))
        return discs

    def _fall(self):
        """Let what is unsupported fall, and part what then touches.

        Two rounds, since a block that is pushed away may itself lose its support.
        """
        for _ in range(2):
            contact.settle(self.blocks, self._free())
            parted = contact.push(self.blocks, self._free(), self._discs())
            if parted is None or (parted == self.blocks).all():
                return
            self.blocks = parted
        contact.settle(self.blocks, self._free())

    def _shift(self, dx, dy, turn):
        """Move sideways and turn, pushing what can be pushed; stay if something jams."""
        before = self.blocks.copy(), self.yaw.copy(), self.tool.copy(), self.tool_yaw, self.knob
        low, high = list(TOOL_LOW[:2]), list(TOOL_HIGH[:2])
        # Kept in [-pi, pi), as the state shows it and policies learn it.
        yaw = float(np.mod(self.tool_yaw + turn + np.pi, 2 * np.pi) - np.pi)
        if 0 <= self.held < KNOB:
            offset = rotate(self.grip[:2], yaw)
            # The limits are moved in, so that the held block stays on the table as well.
            low = np.maximum(low, BLOCK_LOW - offset)
            high = np.minimum(high, BLOCK_HIGH - offset)
        riders = self._riders()
        self.tool[:2] = np.clip(self.tool[:2] + (dx, dy), low, high)
        self.tool_yaw = yaw
        self._carry(riders)
        # All or nothing: half a motion would leave bodies inside each other.
        if not self._make_room(riders):
            self.blocks, self.yaw, self.tool, self.tool_yaw, self.knob = before

    def _carry(self, riders):
        """Put the held block where the tool now is; its riders move along."""
        if not 0 <= self.held < KNOB:
            return
        where = np.append(
            self.tool[:2] + rotate(self.grip[:2], self.tool_yaw), self.tool[2] + self.grip[2]
        )
        self.blocks[riders] += where - self.blocks[self.held]
        self.blocks[riders, :2] = np.clip(self.blocks[riders, :2], BLOCK_LOW, BLOCK_HIGH)
        self.blocks[self.held] = where
        self.yaw[self.held] = self.tool_yaw + self.grip[3]

    def _make_room(self, riders):
        """Push blocks and knob away from the tool; False (nothing moved) if that is impossible."""
        free = [i for i in self._free() if i not in riders]
        blocks = contact.push(self.blocks, free, self._discs())
        knob = self._pushed_knob()
        if blocks is None or knob is None:
            return False
        self.blocks, self.knob = blocks, knob
        return True

    def _pushed_knob(self):
        """Knob position after the fingertips pushed it along its rail, None if it is jammed."""
        knob = self.knob
        reach = KNOB_HALF[0] + FINGER_RADIUS
        for x, y in self._finger_tips():
            if self.tool[2] >= KNOB_TOP or abs(y - RAIL_Y) >= KNOB_HALF[1] + FINGER_RADIUS:
                continue
            # The knob leaves on the side where it is, as its rail allows no other way out.
            if abs(knob - x) < reach:
                knob = x + (reach if knob >= x else -reach)
        jammed = not RAIL_LEFT <= knob <= RAIL_RIGHT
        return None if jammed else knob

    def _lift(self, dz):
        """Move up or down; solid things below stop the way down."""
        riders = self._riders()
        z = float(np.clip(self.tool[2] + dz, TOOL_LOW[2], TOOL_HIGH[2]))
        if dz < 0:
            # A floor above the tool means it stands beside the thing, touching: no way down, but
            # no throw upwards either.
            z = max(z, min(self._floor(riders), float(self.tool[2])))
        self.tool[2] = z
        self._carry(riders)

    def _floor(self, riders):
        """Lowest height the tool point can reach straight down."""
        floor = TOOL_LOW[2]
        below = [contact.as_disc(self.blocks[i]) for i in self._free() if i not in riders]
        for x, y in self._finger_tips():
            for disc in below:
                if np.hypot(disc.x - x, disc.y - y) < disc.radius + FINGER_RADIUS - contact.TOUCH:
                    floor = max(floor, disc.top)
            if self._over_button(x, y):
                floor = max(floor, BUTTON_TOP - BUTTON_TRAVEL)
            reach = KNOB_HALF[0] + FINGER_RADIUS, KNOB_HALF[1] + FINGER_RADIUS
            if abs(x - self.knob) < reach[0] - contact.TOUCH and abs(y - RAIL_Y) < reach[1]:
                floor = max(floor, KNOB_TOP)
        if 0 <= self.held < KNOB:
            bottom = self.grip[2] - BLOCK_HALF  # of the held block, relative to the tool point
            floor = max(floor, -bottom)
            for disc in below:
                if contact.overlap(disc, self.blocks[self.held]) > contact.TOUCH:
                    floor = max(floor, disc.top - bottom)
        return floor

    def _over_button(self, x, y):
        return abs(x - BUTTON[0]) <= BUTTON_HALF and abs(y - BUTTON[1]) <= BUTTON_HALF

    def _press(self):
        """Cap depth from the fingertips on it; the LED toggles once a press."""
        pressing = [self._over_button(x, y) for x, y in self._finger_tips()]
        depth = BUTTON_TOP - self.tool[2] if any(pressing) else 0.0
        self.depth = float(np.clip(depth, 0.0, BUTTON_TRAVEL))
        if self.depth >= BUTTON_TRIP and self.armed:
            self.led, self.armed = not self.led, False
        # Hysteresis: a finger that trembles at the trip point must not toggle the LED twice.
        elif self.depth < BUTTON_TRIP / 2:
            self.armed = True

    def _slide(self, dx):
        """Motion while the knob is held: the rail leaves only x."""
        x = float(np.clip(self.tool[0] + dx, RAIL_LEFT, RAIL_RIGHT))
        self.tool[0] = self.knob = x

    def _fingers(self, command):
        self.command = command
        if command > 0:
            self.held = NOTHING
            self._squeeze(min(APERTURE_OPEN, self.aperture + APERTURE_RATE))
        elif self.held == NOTHING:
            self._close(max(0.0, self.aperture - APERTURE_RATE))

    def _squeeze(self, aperture):
        """Set the aperture, pushing neighbors; keep the old one if something jams."""
        before = self.aperture
        self.aperture = aperture
        if not self._make_room([]):
            self.aperture = before

    def _close(self, aperture):
        """Close toward `aperture`, gripping what the fingers straddle."""
        for i in range(len(COLOURS)):
            across, along = rotate(self.blocks[i, :2] - self.tool[:2], -self.tool_yaw)
            turn = self.yaw[i] - self.tool_yaw
            half = BLOCK_HALF * (abs(np.cos(turn)) + abs(np.sin(turn)))
            height = self.tool[2] - self.blocks[i, 2]
            if (
                abs(along) <= GRASP_ALONG
                and abs(across) + half <= self.aperture / 2
                and -BLOCK_HALF <= height <= BLOCK_HALF - 0.01
            ):
                # The fingers have not come close enough to touch the block yet.
                if aperture > 2 * half:
                    break
                # Parallel jaws square the block up and center it between them.
                quarter = np.pi / 2
                turn -= quarter * np.round(turn / quarter)
                self.grip = np.array([0.0, along, -height, self.yaw[i] - self.tool_yaw - turn])
                self.held, self.aperture = i, 2 * BLOCK_HALF
                self.grasps[i] += 1
                self._carry(self._riders())
                # Squaring up turned the block, which may now overlap a neighbor; this pushes it
                # away.
                self._shift(0.0, 0.0, 0.0)
                return
        else:
            across, along = rotate(np.array([self.knob, RAIL_Y]) - self.tool[:2], -self.tool_yaw)
            if (
                abs(along) <= GRASP_ALONG
                and abs(across) + KNOB_HALF[0] <= self.aperture / 2
                and self.tool[2] <= KNOB_TOP - 0.01
                and aperture <= 2 * KNOB_HALF[0]
            ):
                self.held, self.aperture = KNOB, 2 * KNOB_HALF[0]
                self._slide(0.0)
                return
        self._squeeze(aperture)
