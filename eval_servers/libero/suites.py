"""The suites: which tasks they have, what the policy is told, how long an episode may take.

The tables (`tasks.json`) come with this file, so that they can be read without LIBERO. A suite of
LIBERO-PRO changes the tasks of a plain one and keeps their names: `lan` tells them in other words,
`object` gives things another look, `swap` puts them in each other's places, `task` wants something
else done.

Sources: LIBERO (Liu et al. 2023, arXiv 2306.03310), LIBERO-PRO (arXiv 2510.03827), and openpi's and
openvla's published evaluations for the steps.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Sequence

from eval_servers import rollout

_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks.json")

# Control steps (20 a second) after which an episode of a plain suite has failed.
MAX_STEPS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
PERTURBATIONS = ("lan", "object", "swap", "task")
PERTURBED = ("spatial", "object", "goal", "10")  # the suites that LIBERO-PRO perturbs
STATES = 50  # initial states that come with every task
SUITES = (*MAX_STEPS, *(plain + "_" + kind for plain in PERTURBED for kind in PERTURBATIONS))


class Task(NamedTuple):
    """One task of a suite.

    Attributes:
        name: of its files; a perturbed suite's task has the name of the plain one.
        instruction: what the policy is told.
    """

    name: str
    instruction: str


@dataclass(frozen=True)
class Trial(rollout.Episode):
    """One episode; `task` is the task's name, `seed` the number of the initial state.

    Attributes:
        suite: one of `SUITES`.
        number: of the task in its suite, from 0.
    """

    suite: str
    number: int


def plain(suite: str) -> str:
    """The unperturbed suite that a suite is made of; a plain one's is itself."""
    return suite.partition("_")[0]


def perturbation(suite: str) -> str:
    """What LIBERO-PRO changed, one of `PERTURBATIONS`; "" of a plain suite."""
    return suite.partition("_")[2]


@functools.lru_cache(maxsize=None)
def tasks(suite: str) -> List[Task]:
    """The tasks of a suite, in the published order.

    What is told is the task's name in words, as every published evaluation does; LIBERO's own
    problem files word it oddly. Only where LIBERO-PRO changes what is told or wanted, and keeps
    the old name, the sentence is the problem file's.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in SUITES:
        raise ValueError("there is no suite {!r}; there are {}".format(suite, ", ".join(SUITES)))
    with open(_FILE, encoding="utf-8") as file:
        table: Dict[str, Dict] = json.load(file)
    named = table["tasks"][plain(suite)]
    # The file lists sentences only for suites that change them.
    instructions = table["told"].get(suite, named.values())
    # `zip` cannot be strict in Python 3.8, which this package still runs on.
    return [Task(name, instruction) for name, instruction in zip(named, instructions)]  # noqa: B905


def trials(
    suite: str,
    numbers: Optional[Sequence[int]] = None,
    count: int = STATES,
    swap_instructions: bool = False,
) -> List[Trial]:
    """The episodes of an evaluation, task after task, since changing the world takes seconds.

    Args:
        suite: one of `SUITES`.
        numbers: of the tasks; all by default.
        count: initial states of each task, from the first.
        swap_instructions: tell the policy another task's instruction.

    Raises:
        ValueError: the suite has no such tasks, or the tasks fewer initial states.
    """
    all_tasks = tasks(suite)
    # A task that is named twice would give two episodes of one index.
    numbers = list(dict.fromkeys(range(len(all_tasks)) if numbers is None else numbers))
    unknown = [number for number in numbers if not 0 <= number < len(all_tasks)]
    if unknown or not 1 <= count <= STATES:
        raise ValueError(
            "tasks {} of suite {}: it has 0 to {}".format(unknown, suite, len(all_tasks) - 1)
            if unknown
            else "{} episodes a task: there are 1 to {} initial states".format(count, STATES)
        )
    instructions = {all_tasks[number].name: all_tasks[number].instruction for number in numbers}
    if swap_instructions:
        originals = instructions
        instructions = {
            name: originals[other]
            for name, other in rollout.other_instructions(list(originals)).items()
        }
    return [
        # The same episode has the same index however many are run, so that runs can be compared.
        Trial(
            number * STATES + k,
            k,
            all_tasks[number].name,
            instructions[all_tasks[number].name],
            suite,
            number,
        )
        for number in numbers
        for k in range(count)
    ]
