"""The episodes of an evaluation, and what the policy is told in each.

Sources: see `tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence

from eval_servers import rollout
from eval_servers.simpler.tasks import ENVIRONMENTS, TASKS, kind_of, robot_of
from eval_servers.simpler.worlds import SETTINGS, Start, settings_of, starts, worlds


@dataclass(frozen=True)
class Trial(rollout.Episode):
    """One episode of SimplerEnv; `task` is the name of its environment.

    Attributes:
        setting: one of `SETTINGS`.
        variant: of the world, a key of `worlds`.
        start: how it is reset.
        steps: control steps before it is judged.
        swapped: whether the policy is told another task's instruction, and nothing else after.
    """

    setting: str
    variant: str
    start: Start
    steps: int
    swapped: bool = False


# Of every 12 successive starts of "move near": the three objects on the table.
_TRIPLETS = (
    ("blue plastic bottle", "pepsi can", "orange"),
    ("7up can", "apple", "sponge"),
    ("coke can", "redbull can", "apple"),
    ("sponge", "blue plastic bottle", "7up can"),
    ("orange", "pepsi can", "redbull can"),
)
_PAIRS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))  # which to move near which


def instruction(name: str, start: Start) -> str:
    """Return the environment's first instruction; "" if only it knows."""
    if kind_of(name) == "near" and start.episode is not None:
        # The simulator numbers its 60 starts so: 5 triplets, 2 layouts, 6 ordered pairs.
        objects, (moved, target) = _TRIPLETS[start.episode // 12], _PAIRS[start.episode % 6]
        return "move {} near {}".format(objects[moved], objects[target])
    return ENVIRONMENTS[name].instruction


def trials(
    names: Sequence[str], setting: str, count: Optional[int] = None, swap: bool = False
) -> List[Trial]:
    """All episodes of an evaluation.

    Args:
        names: tasks of the published table, or single environments.
        setting: one of `SETTINGS`.
        count: of each environment only so many, spread evenly over its variants and starts.
        swap: tell the policy another environment's instruction.

    Raises:
        ValueError: listing everything that does not go together.
    """
    unknown = [name for name in names if name not in TASKS and name not in ENVIRONMENTS]
    if unknown or setting not in SETTINGS:
        all_names = list(dict.fromkeys([*TASKS, *ENVIRONMENTS]))
        subject = "task {}".format(", ".join(unknown)) if unknown else "setting {}".format(setting)
        legal = all_names if unknown else SETTINGS
        raise ValueError("there is no {}; there are {}".format(subject, ", ".join(legal)))
    parts: List[str] = []
    for name in names:
        split = setting != "prepackaged" and name in TASKS
        parts += TASKS[name] if split else [name]
    parts = list(dict.fromkeys(parts))
    if len({robot_of(part) for part in parts}) > 1:
        raise ValueError("one evaluation has one robot: give Google's and WidowX's tasks apart")
    wrong = [part for part in parts if setting not in settings_of(part)]
    if wrong:
        raise ValueError("{} is no setting of {}".format(setting, ", ".join(wrong)))
    swapped = rollout.other_instructions(parts) if swap else {}
    episodes: List[Trial] = []
    for part in parts:
        rows = [
            (variant, start)
            for variant in worlds(part, setting)
            for start in starts(part, setting, variant)
        ]
        # Evenly spaced, so that a short run still meets every kind of variant.
        if count is not None and count < len(rows):
            rows = [rows[i * len(rows) // count] for i in range(count)]
        for variant, start in rows:
            # A row's seed identifies its start when runs are paired.
            seed = start.seed if start.seed is not None else start.episode or 0
            text = instruction(swapped.get(part, part), start)
            if swap and not text:
                raise ValueError("{} has no instruction of its own to swap".format(swapped[part]))
            steps = ENVIRONMENTS[part].steps
            episodes.append(
                Trial(len(episodes), seed, part, text, setting, variant, start, steps, bool(swap))
            )
    return episodes
