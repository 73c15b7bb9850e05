"""The tasks: what they are called, how they are said, how they start and when they are done.

A task is judged the way CALVIN judges one: by an oracle that compares the info at the start of
the attempt with the info now. The oracles exclude each other: doing one task properly never
passes for another (`LIFT_HEIGHT` is well above the height at which blocks are carried).
"""

import difflib
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np

from eval_servers.tabletop.layout import (
    BLOCK_HALF,
    COLOURS,
    LANES,
    PAD_HALF,
    PADS,
    SIDES,
    SPAWN_GAP,
    SPAWN_HIGH,
    SPAWN_LOW,
    SPAWN_YAW,
    TOOL_SPAWN_HIGH,
    TOOL_SPAWN_LOW,
)

HORIZON = 60  # control steps an attempt may take
LIFT_HEIGHT = 0.20  # meters, block center
SLIDER_END = 0.25  # share of the rail that counts as an end

# The first phrasing is the one used for evaluation (CALVIN's "validation annotation").
_PHRASES = {
    "lift": (
        "lift the {0} block",
        "pick up the {0} block",
        "grab the {0} block and raise it",
        "take the {0} cube and hold it up",
    ),
    "place": (
        "put the {0} block on the {1} pad",
        "place the {0} block onto the {1} pad",
        "move the {0} cube to the {1} pad",
        "carry the {0} block over to the {1} pad",
    ),
    "led": (
        "turn {0} the light",
        "switch {0} the light",
        "press the button to turn {0} the lamp",
        "push the button so that the light goes {0}",
    ),
    "slider": (
        "slide the handle to the {0}",
        "move the slider to the {0}",
        "push the handle {0}",
        "grasp the slider and pull it to the {0}",
    ),
}


# Task -> its kind and the words that fill its phrases.
_TABLE: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    **{f"lift_{c}_block": ("lift", (c,)) for c in COLOURS},
    **{f"place_{c}_{s}": ("place", (c, s)) for c in COLOURS for s in SIDES},
    **{f"turn_{w}_led": ("led", (w,)) for w in ("on", "off")},
    **{f"move_slider_{s}": ("slider", (s,)) for s in SIDES},
}
TASKS = tuple(_TABLE)


def parse(task: str) -> Tuple[str, Tuple[str, ...]]:
    """Kind ("lift", "place", "led", "slider") and arguments of a task.

    Raises:
        ValueError: if there is no such task; the message lists all.
    """
    if task not in _TABLE:
        close = difflib.get_close_matches(str(task), TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no task {task!r}{hint} Tasks: {', '.join(TASKS)}")
    return _TABLE[task]


def instruction(task: str) -> str:
    """The one phrasing used for evaluation."""
    return annotations(task)[0]


def annotations(task: str) -> Tuple[str, ...]:
    """All phrasings used in demonstrations, the evaluation's first."""
    kind, words = parse(task)
    return tuple(phrase.format(*words) for phrase in _PHRASES[kind])


def on_pad(position: Sequence[float], side: str) -> bool:
    """Whether a block center [3] lies over a pad, directly on the table."""
    x, y = PADS[side]
    return (
        abs(position[0] - x) <= PAD_HALF
        and abs(position[1] - y) <= PAD_HALF
        and position[2] <= BLOCK_HALF + 1e-3
    )


def _lifted(start, end):
    return end["held"] and end["pos"][2] > LIFT_HEIGHT and start["pos"][2] <= LIFT_HEIGHT


def _placed(start, end, side):
    """It lies on the pad, did not before, and was carried there, not pushed."""
    # A block pushed onto the pad was not placed: that would reward a policy that cannot grasp.
    carried = start["held"] or end["grasps"] > start["grasps"]
    before = on_pad(start["pos"], side) and not start["held"]
    return not end["held"] and on_pad(end["pos"], side) and carried and not before


def solved(task: str, start_info: Dict[str, Any], info: Dict[str, Any]) -> bool:
    """Task oracle: whether `task` was done between the two infos.

    Args:
        task: one of `TASKS`.
        start_info: `get_info()` at the start of the attempt.
        info: `get_info()` now.

    Raises:
        ValueError: if there is no such task.
    """
    kind, words = parse(task)
    start, end = start_info["scene_info"], info["scene_info"]
    if kind == "lift":
        return bool(_lifted(start["blocks"][words[0]], end["blocks"][words[0]]))
    if kind == "place":
        return bool(_placed(start["blocks"][words[0]], end["blocks"][words[0]], words[1]))
    if kind == "led":
        return end["led"] == (words[0] == "on") and end["led"] != start["led"]
    # Distance from the wanted end, as a share of the rail.
    ends = [s if words[0] == "left" else 1.0 - s for s in (start["slider"], end["slider"])]
    # It must come from the other half, or a slider that already stood there would count.
    return ends[0] > 0.5 and ends[1] <= SLIDER_END


def initial_conditions(task: Optional[str], rng: Any) -> Dict[str, Any]:
    """Draw a start state in which `task` is possible and not done; None for any state.

    The same `rng` state gives the same blocks and tool for every task; slider and LED are then
    set as the task needs.

    Args:
        task: one of `TASKS` or None.
        rng: `numpy.random.RandomState` or `Generator`.

    Returns:
        The `conditions` that `World` takes.

    Raises:
        ValueError: if there is no such task.
    """
    kind, words = parse(task) if task is not None else ("", ("",))
    # Drawing all blocks anew keeps the distribution of accepted starts uniform.
    while True:
        spots = rng.uniform(SPAWN_LOW, SPAWN_HIGH, size=(len(COLOURS), 2))
        spots[:, 0] += [LANES[colour] for colour in COLOURS]
        gaps = [np.hypot(*(spots[i] - spots[j])) for i in range(len(COLOURS)) for j in range(i)]
        if min(gaps) >= SPAWN_GAP:
            break
    yaw = rng.uniform(-SPAWN_YAW, SPAWN_YAW, size=len(COLOURS))
    tool = rng.uniform(TOOL_SPAWN_LOW, TOOL_SPAWN_HIGH)
    # All are drawn whatever the task, so that one seed gives the same blocks for every task.
    end, right, led = rng.uniform(0.0, 0.15), rng.uniform() < 0.5, bool(rng.uniform() < 0.5)
    if kind == "slider":
        right = words[0] == "left"
    if kind == "led":
        led = words[0] == "off"
    return {
        "blocks": {
            c: (float(spots[i, 0]), float(spots[i, 1]), float(yaw[i]))
            for i, c in enumerate(COLOURS)
        },
        "tool": tuple(float(v) for v in tool),
        "slider": float(1.0 - end if right else end),
        "led": led,
    }
