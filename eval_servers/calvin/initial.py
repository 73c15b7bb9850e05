"""The simulator state a chain starts in: CALVIN's rule, to the bit, without its dependencies.

Where two blocks are on the table, which lies where is random, and so is every block's yaw. The
seed is a hash of the state's description, so a wrong hash would silently change every scene. CALVIN
takes `fnv1_32` of the package pyhash, which is neither FNV-1 nor over UTF-8: it is FNV-0 (32 bit,
offset basis 0) over the string's UTF-16-LE bytes.
"""

from __future__ import annotations

import math
from typing import Dict, NamedTuple, Tuple

import numpy as np

_PRIME = 0x01000193  # 32-bit FNV prime

# Tool point x y z (m), roll pitch yaw (rad), gripper width (m), 7 joints (rad), gripper command.
ROBOT = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
_SLIDER = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.070341633, 0.0924044687, 0.460990009),
}
_TABLE = (
    (0.0500000896, -0.120000177, 0.459990009),
    (0.229995412, -0.11999514, 0.45999001),
)
_YAW = (math.pi / 2 - math.pi / 8, math.pi / 2 + math.pi / 8)
# Where calvin_env lays blocks in each scene when nobody says where, as it did when its data were
# recorded: lowest and highest x and y (m). Source: calvin_env 797142c `conf/scene/`.
_BEHIND = ((-0.12, 0.05), (0.06, 0.12))
SURFACES = {
    "A": {
        "table": ((-0.2, -0.15), (0.35, -0.03)),
        "slider_left": ((-0.32, 0.05), (-0.16, 0.12)),
        "slider_right": ((-0.05, 0.05), (0.13, 0.12)),
    },
    "B": {
        "table": ((-0.35, -0.15), (0.15, -0.03)),
        "slider_left": _BEHIND,
        "slider_right": ((0.15, 0.05), (0.33, 0.12)),
    },
    "C": {
        "table": ((0.0, -0.15), (0.35, -0.03)),
        "slider_left": _BEHIND,
        "slider_right": ((0.15, 0.05), (0.3, 0.12)),
    },
    "D": {
        "table": ((0.0, -0.15), (0.35, -0.03)),
        "slider_left": ((-0.32, 0.05), (-0.16, 0.12)),
        "slider_right": ((-0.05, 0.05), (0.13, 0.12)),
    },
}
_HEIGHT = 0.46  # of all three surfaces (m)
# Between the centers of two blocks (m); the longest is 0.1 m long, so none touches another.
CLEARANCE = 0.11

# Fields of a scene observation, float [24].
SLIDER, DRAWER, BUTTON, SWITCH, LIGHTBULB, LED = range(6)
BLOCKS = {"red": slice(6, 12), "blue": slice(12, 18), "pink": slice(18, 24)}  # xyz, roll pitch yaw


class State(NamedTuple):
    """Description of a chain's start; the order of the fields is part of its random seed."""

    led: int
    lightbulb: int
    slider: str  # left, right
    drawer: str  # open, closed
    red_block: str  # table, slider_left, slider_right
    blue_block: str
    pink_block: str
    grasped: int

    @property
    def places(self) -> Dict[str, str]:
        """The place of each block, by its color."""
        return {"red": self.red_block, "blue": self.blue_block, "pink": self.pink_block}


def fnv0_utf16(text: str) -> int:
    """Return the value of `pyhash.fnv1_32()(text)`: FNV-0, 32 bit, over UTF-16-LE."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * _PRIME & 0xFFFFFFFF) ^ byte
    return value


def seed_of(state: State) -> int:
    """Seed of a state's random parts; CALVIN hashes the print-out of a dict's values."""
    return fnv0_utf16("dict_values({})".format(list(state)))


def initial_state(state: State) -> Tuple[np.ndarray, np.ndarray]:
    """Return the state that the simulator is reset to.

    Returns:
        robot_obs float64 [15] and scene_obs float64 [24], in CALVIN's layout and units.

    Raises:
        ValueError: if a block is nowhere the scene has.
    """
    rng = np.random.RandomState(seed_of(state))
    places = [0, 1]
    rng.shuffle(places)
    scene = np.zeros(24)
    scene[SLIDER] = 0.28 if state.slider == "left" else 0.0
    scene[DRAWER] = 0.22 if state.drawer == "open" else 0.0
    scene[SWITCH] = 0.088 if state.lightbulb == 1 else 0.0
    scene[LIGHTBULB], scene[LED] = state.lightbulb, state.led
    unknown = {k: v for k, v in state.places.items() if v != "table" and v not in _SLIDER}
    if unknown:
        raise ValueError("blocks {}: not on the table or in the slider".format(unknown))
    # Red has the first place of the table, pink the second, blue the one red leaves; with three
    # blocks on the table, which no state of the list has, blue and pink would share one.
    table = {"red": 0, "blue": 1 if state.red_block == "table" else 0, "pink": 1}
    for name, fields in BLOCKS.items():
        pose = scene[fields]
        place = state.places[name]
        pose[:3] = _SLIDER[place] if place in _SLIDER else _TABLE[places[table[name]]]
        pose[5] = rng.uniform(*_YAW)
    return np.array(ROBOT), scene


def redrawn_state(state: State, seed: int, scene: str = "D") -> Tuple[np.ndarray, np.ndarray]:
    """A start of the same description whose blocks lie elsewhere on their surfaces.

    CALVIN's own rule has two places on the table and one in each half of the slider, so a policy
    may score without looking where a block is. Here places and yaws are drawn from all that the
    training data were drawn from.

    Args:
        state: what is on, open and where; as in `initial_state`.
        seed: of the draw.
        scene: A, B, C or D.

    Returns:
        As `initial_state`.

    Raises:
        ValueError: as `initial_state`.
    """
    robot, obs = initial_state(state)
    rng = np.random.RandomState(seed)
    names = list(BLOCKS)
    while True:
        corners = np.array([SURFACES[scene][state.places[name]] for name in names])
        places = rng.uniform(corners[:, 0], corners[:, 1])
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
        # Drawn all again, so that no block is likelier in a corner than another.
        if apart[np.triu_indices(len(names), 1)].min() >= CLEARANCE:
            break
    for i, name in enumerate(names):
        pose = obs[BLOCKS[name]]
        pose[:2], pose[2], pose[5] = places[i], _HEIGHT, rng.uniform(-math.pi, math.pi)
    return robot, obs
