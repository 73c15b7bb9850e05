"""CALVIN's evaluation list: 1000 chains of five tasks, the states they start in, the instructions.

The list (`chains.json`) is what CALVIN's own generator gives for 1000 chains, which is what
RoboVLMs evaluates on; instructions are the validation split's, one a task. Both are data: a number
of the protocol, not something to sample anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from eval_servers import rollout
from eval_servers.calvin.initial import State, initial_state, redrawn_state, seed_of

_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chains.json")
CHAIN = "chain"  # `task` of an episode that has several


@dataclass(frozen=True)
class Chain(rollout.Episode):
    """One episode of several tasks, or of one.

    Attributes:
        state: where it starts.
        tasks: to be solved one after another; the first failure ends the chain.
        instructions: what the policy is told, one a task; `instruction` is the first.
        redrawn: the scene whose surfaces the blocks are laid on anew, by `seed`; "" = they lie
            where CALVIN's rule has them.
    """

    state: State
    tasks: Tuple[str, ...]
    instructions: Tuple[str, ...]
    redrawn: str = ""


class Protocol(NamedTuple):
    """The evaluation list.

    Attributes:
        instructions: task -> sentence; the 34 tasks in CALVIN's order.
        states: the distinct starts, in order of their first use.
        chains: (start, five tasks), in the order of the evaluation.
    """

    instructions: Dict[str, str]
    states: Tuple[State, ...]
    chains: Tuple[Tuple[State, Tuple[str, ...]], ...]


def load() -> Protocol:
    """Read the list that comes with this file."""
    with open(_FILE, encoding="utf-8") as file:
        raw: Dict[str, Any] = json.load(file)
    names = list(raw["instructions"])
    states = tuple(State(*values) for values in raw["states"])
    # Numbers stand for starts and tasks, since a thousand chains share few of either.
    chains = tuple(
        (states[state], tuple(names[number] for number in numbers))
        for state, *numbers in raw["chains"]
    )
    return Protocol(raw["instructions"], states, chains)


def possible(task: str, state: State) -> bool:
    """Whether a single task makes sense from a start: a block to lift lies there, a lamp is off.

    Tasks that need a block in the hand are possible from no start.
    """
    if task.startswith(("place_in", "stack", "unstack")):
        return False
    words = task.split("_")
    if task.startswith(("turn_on", "turn_off")):
        lamp = state.led if task.endswith("led") else state.lightbulb
        return lamp == (0 if words[1] == "on" else 1)
    if task.startswith("move_slider"):
        return state.slider != words[-1]
    # The verb tells these from lifting a block out of the drawer, which ends in the same word.
    if task.endswith("drawer") and words[0] in ("open", "close"):
        return state.drawer == ("closed" if words[0] == "open" else "open")
    if task == "push_into_drawer":
        return state.drawer == "open" and "table" in state.places.values()
    # What is left is named verb, color, "block", and for lifting the surface.
    place = state.places[words[1]]
    if words[0] == "lift":
        # A place in the slider says which half as well, as slider_left.
        return place.startswith(words[-1])
    return place == "table"  # rotate, push


def episodes_of_chains(
    protocol: Protocol, first: int, last: int, swap_instructions: bool = False
) -> List[Chain]:
    """Chains `first` to `last` - 1 of the list.

    Raises:
        ValueError: if the list has no such range.
    """
    if not 0 <= first < last <= len(protocol.chains):
        raise ValueError(
            "chains {}:{}: not a range within 0:{}".format(first, last, len(protocol.chains))
        )
    instructions = _told(protocol, swap_instructions)
    return [
        _chain(index, CHAIN, state, tasks, instructions)
        # Numbered before the range is cut out, so that rows of partial runs can be merged and
        # paired.
        for index, (state, tasks) in enumerate(protocol.chains)
        if first <= index < last
    ]


def episodes_of_tasks(
    protocol: Protocol, tasks: Sequence[str], count: int, swap_instructions: bool = False
) -> List[Chain]:
    """`count` episodes of one task each, round-robin over `tasks`, from starts that allow them.

    Every task walks through its own starts in the list's order; a task with fewer starts than
    episodes goes round again.

    Raises:
        ValueError: naming the tasks that do not exist, or that no start allows.
    """
    unknown = [task for task in tasks if task not in protocol.instructions]
    if unknown:
        raise ValueError("no task {}; tasks: {}".format(unknown, list(protocol.instructions)))
    # Without this filter a task could be solved, or impossible, before the first step.
    starts = {task: [s for s in protocol.states if possible(task, s)] for task in tasks}
    never = [task for task in tasks if not starts[task]]
    if never:
        raise ValueError("{} are possible from no start: evaluate chains".format(never))
    instructions = _told(protocol, swap_instructions)
    episodes = []
    for index in range(count):
        task = tasks[index % len(tasks)]
        # The quotient counts rounds, so a task's n-th start is the same whatever tasks run beside
        # it.
        state = starts[task][index // len(tasks) % len(starts[task])]
        episodes.append(_chain(index, task, state, (task,), instructions))
    return episodes


def start_of(chain: Chain) -> Tuple[np.ndarray, np.ndarray]:
    """What the simulator is reset to: robot_obs float64 [15] and scene_obs float64 [24]."""
    if chain.redrawn:
        return redrawn_state(chain.state, chain.seed, chain.redrawn)
    return initial_state(chain.state)


def redraw(episodes: Sequence[Chain], scene: str, seed: int) -> List[Chain]:
    """The same episodes with their blocks laid elsewhere, see `initial.redrawn_state`.

    Args:
        episodes: of either kind.
        scene: A, B, C or D, whose surfaces are meant.
        seed: another one gives other places; at least 1.
    """
    return [
        # Each episode has a draw of its own, even where starts are of the same description.
        dataclasses.replace(episode, seed=1_000_000 * seed + episode.index, redrawn=scene)
        for episode in episodes
    ]


def _told(protocol: Protocol, swap_instructions: bool) -> Dict[str, str]:
    """Task -> the sentence the policy is given."""
    sentences = protocol.instructions
    if not swap_instructions:
        return sentences
    return {
        task: sentences[other]
        for task, other in rollout.other_instructions(list(sentences)).items()
    }


def _chain(
    index: int, task: str, state: State, tasks: Tuple[str, ...], sentences: Dict[str, str]
) -> Chain:
    instructions = tuple(sentences[name] for name in tasks)
    return Chain(index, seed_of(state), task, instructions[0], state, tasks, instructions)
