"""A scripted expert and the demonstrations it gives.

The expert has no memory: its action depends only on the current state and the task. Far from its
target it moves at full speed, near it in proportion to the distance left, so that what it does
can be learned from single frames.
"""

from __future__ import annotations

import logging
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from eval_servers.tabletop import tasks as tasklib
from eval_servers.tabletop.env import TabletopEnv
from eval_servers.tabletop.layout import (
    ACTION_SCALE,
    APERTURE_OPEN,
    BLOCK_HALF,
    BUTTON,
    BUTTON_TRIP,
    KNOB_TOP,
    PAD_HALF,
    PADS,
    RAIL_LEFT,
    RAIL_RIGHT,
    RAIL_Y,
    YAW_SCALE,
)

log = logging.getLogger(__name__)

OPEN, CLOSE = 1.0, -1.0
HOVER = 0.09  # meters above the working height while moving across
NEAR = 0.02  # meters sideways within which the tool works: grips, presses
REST = 0.18  # height of the tool point when there is nothing left to do
LIFT = 0.26  # where a lifted block's tool point goes
WORK_Z = {"block": 0.02, "knob": 0.022, "button": 0.012}  # height of the tool point at work


class Expert:
    """Solves every task from any state it can get into by small mistakes.

    Args:
        task: one of `tasks.TASKS`; None takes the task the environment was reset with.
    """

    def __init__(self, task: str | None = None):
        self.task = task
        if task is not None:
            tasklib.parse(task)

    def act(self, env: Any) -> np.ndarray:
        """The clean action [7] for the environment's current state, float32.

        Args:
            env: anything with `get_info()`, and `task` unless the expert was given one.

        Raises:
            ValueError: if neither the expert nor the environment has a task.
        """
        task = self.task if self.task is not None else env.task
        if task is None:
            raise ValueError("no task: give one to Expert(task) or to env.reset(seed, task)")
        info = env.get_info()
        kind, words = tasklib.parse(task)
        plan = {"lift": _lift, "place": _place, "led": _press, "slider": _slide}[kind]
        wanted = {"lift": f"{words[0]}_block", "place": f"{words[0]}_block", "slider": "slider"}
        held = info["robot_info"]["held"]
        # A detour or a mistake may have left the wrong thing in the hand.
        if held is not None and held != wanted.get(kind):
            target, grip = _put_down(info, held)
        else:
            target, grip = plan(info, *words)
        return _towards(info, target, grip)


def _towards(info, target, grip):
    """Action that moves the tool point to `target` [3], proportionally within a step's reach."""
    robot = info["robot_info"]
    action = np.zeros(7, np.float32)
    action[:3] = (np.asarray(target) - robot["tcp_pos"]) / ACTION_SCALE
    action[5] = -robot["tcp_orn"][2] / YAW_SCALE
    action[:6] = np.clip(action[:6], -1.0, 1.0)
    action[6] = grip
    return action


def _approach(info, spot, low, hover=HOVER, band=(0.015, 0.05)):
    """Next waypoint on the way to `spot` [2] at height `low`, and the sideways distance left.

    The height sinks from `low + hover` to `low` while the distance falls through `band`; a tool
    that is low and far off rises first.
    """
    tool = np.asarray(info["robot_info"]["tcp_pos"])
    way = np.asarray(spot) - tool[:2]
    distance = float(np.hypot(*way))
    z = low + hover * np.clip((distance - band[0]) / (band[1] - band[0]), 0.0, 1.0)
    # A low tool far off would push blocks aside on its way.
    if distance > band[1]:
        way = way * np.clip((tool[2] - low) / (0.6 * hover), 0.0, 1.0)
    return np.append(tool[:2] + way, z), distance


def _grasp(info, spot, low, top):
    """Waypoint and gripper command to take the thing at `spot` that ends at height `top`."""
    robot = info["robot_info"]
    z, apart = robot["tcp_pos"][2], robot["gripper_opening_width"] > APERTURE_OPEN - 0.01
    target, distance = _approach(info, spot, low)
    if not apart:  # closed fingers must not come down on the thing
        target[2] = max(target[2], top + 0.02)
    ready = apart and distance < NEAR and z < low + 0.018
    return target, CLOSE if ready else OPEN


def _grasp_block(info, colour):
    spot = info["scene_info"]["blocks"][colour]["pos"]
    base = spot[2] - BLOCK_HALF
    return _grasp(info, spot[:2], base + WORK_Z["block"], base + 2 * BLOCK_HALF)


def _lift(info, colour):
    if not info["scene_info"]["blocks"][colour]["held"]:
        return _grasp_block(info, colour)
    x, y, _ = info["robot_info"]["tcp_pos"]
    return np.array([x, y, LIFT]), CLOSE


def _place(info, colour, side):
    block = info["scene_info"]["blocks"][colour]
    if not block["held"]:
        if tasklib.on_pad(block["pos"], side):
            return _rest(info)
        return _grasp_block(info, colour)
    return _set(info, colour, _free_spot(info, colour, side))


def _free_spot(info, colour, side):
    """The pad's center, or the place on it that is farthest from the blocks already there."""
    occupied = [
        np.asarray(b["pos"][:2]) for c, b in info["scene_info"]["blocks"].items() if c != colour
    ]
    centre = np.asarray(PADS[side])
    # 2 cm from the rim, so that the block's center is surely on the pad.
    reach = PAD_HALF - 0.02
    spots = [centre] + [centre + (i * reach, j * reach) for i in (-1, 1) for j in (-1, 1)]
    room = [min(np.hypot(*(spot - other)) for other in occupied) for spot in spots]
    # Nearer than this the block could land on the one that is there.
    return spots[0] if room[0] > 2.5 * BLOCK_HALF else spots[int(np.argmax(room))]


def _set(info, colour, spot):
    """Carry the held block to `spot` [2] and let it go there."""
    robot = info["robot_info"]
    tool = np.asarray(robot["tcp_pos"])
    offset = np.asarray(info["scene_info"]["blocks"][colour]["pos"]) - tool
    # At this height of the tool the block's underside is 4 mm above the table.
    low = BLOCK_HALF - offset[2] + 0.004
    target, distance = _approach(info, np.asarray(spot) - offset[:2], low, band=(0.02, 0.06))
    ready = distance < 0.03 and tool[2] < low + 0.025
    return target, OPEN if ready else CLOSE


def _put_down(info, held):
    """Let go of something the task does not need: where it is, but not from high up."""
    if held == "slider":
        return np.asarray(info["robot_info"]["tcp_pos"]), OPEN
    colour = held[: -len("_block")]
    return _set(info, colour, info["scene_info"]["blocks"][colour]["pos"][:2])


def _press(info, word):
    if info["scene_info"]["led"] == (word == "on"):
        return _rest(info, CLOSE)
    if info["scene_info"]["button"] >= BUTTON_TRIP:
        return _rest(info, CLOSE)  # pressed already: it must come up before the next press
    target, _ = _approach(info, BUTTON, WORK_Z["button"], hover=0.08, band=(0.02, 0.06))
    return target, CLOSE


def _slide(info, side):
    scene = info["scene_info"]
    # Well within the share of the rail that the oracle counts as an end.
    goal = 0.05 if side == "left" else 0.95
    x = RAIL_LEFT + scene["slider"] * (RAIL_RIGHT - RAIL_LEFT)
    done = abs(scene["slider"] - goal) < 0.1
    if info["robot_info"]["held"] == "slider":
        goal_x = RAIL_LEFT + goal * (RAIL_RIGHT - RAIL_LEFT)
        return np.array([goal_x, RAIL_Y, info["robot_info"]["tcp_pos"][2]]), OPEN if done else CLOSE
    if done:
        return _rest(info)
    return _grasp(info, (x, RAIL_Y), WORK_Z["knob"], KNOB_TOP)


def _rest(info, grip=OPEN):
    x, y, _ = info["robot_info"]["tcp_pos"]
    return np.array([x, y, REST]), grip


def demonstrations(
    seeds: Iterable[int],
    tasks: Sequence[str] = tasklib.TASKS,
    noise: float = 0.25,
    detours: float = 0.5,
    rng: np.random.RandomState | np.random.Generator | None = None,
    image_size: int | tuple[int, int] = 64,
    tail: int = 2,
) -> Iterator[dict[str, Any]]:
    """Episodes in which the expert solves its task although its hand is disturbed.

    What is executed is disturbed, the label stays the expert's clean action (Laskey et al. 2017,
    DART), so that the data shows how to come back from mistakes. Besides noise there are detours:
    for a few steps the hand does another task. Without them whatever the hand is nearest to is
    almost always what the instruction names, and a policy learns to look instead of to listen.

    Args:
        seeds: one episode each; episode i is given tasks[i % len(tasks)].
        tasks: names out of `tasks.TASKS`.
        noise: standard deviation added to the x, y and z commands, in action units.
        detours: share of episodes that begin with a detour; a third of it is the share that, on
            top, makes another one on the way.
        rng: source of noise and of phrasings; by default each episode's own, made from its seed,
            so that any split of the seeds over processes gives the same data.
        image_size: as for `TabletopEnv`.
        tail: steps recorded after success.

    Yields:
        {"steps": {"observation/rgb_static" uint8 [T,H,W,3], "observation/rgb_gripper" likewise,
        "observation/robot_obs" float32 [T,15], "action" float32 [T,7], "language_instruction"
        str [T], "is_first", "is_last", "is_terminal" bool [T], "reward", "discount" float32 [T]},
        "episode_metadata": {"task", "seed"}}. An attempt that fails within `HORIZON` steps is
        left out and logged.

    Raises:
        ValueError: if a task does not exist.
    """
    for task in tasks:
        tasklib.parse(task)
    env, expert = TabletopEnv(image_size), Expert()
    for number, seed in enumerate(seeds):
        task = tasks[number % len(tasks)]
        source = np.random.RandomState(int(seed) % 2**31 + 1) if rng is None else rng
        phrases = tasklib.annotations(task)
        phrase = phrases[min(int(source.uniform() * len(phrases)), len(phrases) - 1)]
        obs, steps, remaining = env.reset(seed, task), [], None
        start, away = env.get_info(), _detours(source, task, detours)
        for count in range(tasklib.HORIZON + tail):
            label = expert.act(env)
            # Recorded is what the expert would do, not the disturbed action that is executed.
            steps.append((obs, label))
            if remaining == 0:
                break
            # A detour after success could undo it in the recorded tail.
            other = None if remaining is not None else away.get(count)
            executed = label.copy() if other is None else other.act(env)
            executed[:3] += noise * source.normal(size=3)
            obs = env.step(executed)
            if remaining is not None:
                remaining -= 1
            elif tasklib.solved(task, start, env.get_info()):
                remaining = tail
        if remaining is None:
            log.warning("seed %s: the expert did not finish %s; left out", seed, task)
            continue
        yield _episode(steps, phrase, task, seed)


def _detours(source, task, probability):
    """Step -> the expert that has the hand then, for the steps of an episode's detours."""
    other_tasks = [name for name in tasklib.TASKS if name != task]
    away = {}
    for chance, latest in ((probability, 0), (probability / 3, 16)):
        # Drawn whether used or not, so that the probability does not change what follows.
        draws = source.uniform(size=4)
        if draws[0] < chance:
            expert = Expert(other_tasks[int(draws[1] * len(other_tasks))])
            first = int(draws[2] * (latest + 1))
            away.update(dict.fromkeys(range(first, first + 2 + int(draws[3] * 10)), expert))
    return away


def _episode(steps, phrase, task, seed):
    count = len(steps)
    last = np.arange(count) == count - 1
    columns = {
        f"observation/{key}": np.stack([obs[key] for obs, _ in steps])
        for key in ("rgb_static", "rgb_gripper", "robot_obs")
    }
    columns["action"] = np.stack([label for _, label in steps]).astype(np.float32)
    columns["language_instruction"] = np.full(count, phrase)
    columns["is_first"] = np.arange(count) == 0
    # Only successes are recorded, so the last step is terminal: reward 1, discount 0.
    columns["is_last"] = columns["is_terminal"] = last
    columns["reward"] = last.astype(np.float32)
    columns["discount"] = (~last).astype(np.float32)
    return {"steps": columns, "episode_metadata": {"task": task, "seed": int(seed)}}
