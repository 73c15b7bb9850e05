"""What counts as solved: CALVIN's 34 tasks as changes from a start info to an end info.

An info is what calvin_env's `get_info` returns: poses, joint states, lamps, and contact points as
pybullet gives them (element 2 is the other body, element 4 its link). Numbers and conditions are
those of CALVIN's task table (new_playtable_tasks.yaml) and of its task functions, including what
they do not check; this file agrees with them on every info (tests/eval_servers/test_calvin_sim.py).
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Set, Tuple

import numpy as np

Info = Dict[str, Any]
_BLOCKS = ("red", "blue", "pink")


def solved(task: str, start: Info, end: Info) -> bool:
    """Whether `task` was solved between two infos.

    Raises:
        KeyError: if there is no such task.
    """
    check, arguments = TASKS[task]
    return bool(check(start, end, *arguments))


def _rotated(start: Info, end: Info, block: str, degrees: float) -> bool:
    """Turned about the vertical by more than `degrees` (+ left), staying flat, within 0.1 m."""
    before, after = _block(start, block), _block(end, block)
    # Meters: a block that was carried or pushed off while it turned does not count as rotated.
    if np.linalg.norm(_moved(before, after)) > 0.1:
        return False
    # A block that touches nothing, or only the robot, is in the air.
    if not _bodies(after) - {_robot(start)}:
        return False
    roll, pitch, yaw = _turn(before["current_orn"], after["current_orn"])
    # Degrees: a tipped block has no meaningful yaw.
    if abs(roll) >= 30 or abs(pitch) >= 30:
        return False
    return degrees < yaw < 180 if degrees > 0 else degrees > yaw > -180


def _pushed(start: Info, end: Info, block: str, metres: float) -> bool:
    """Moved along x (+ right) on what it lay on at the start."""
    before, after = _block(start, block), _block(end, block)
    surfaces = _links(before, without=_robot(start)), _links(after, without=_robot(start))
    # A block that left its surface was lifted or fell; CALVIN counts neither as a push.
    if not (surfaces[0] and surfaces[0] <= surfaces[1]):
        return False
    distance = _moved(before, after)[0]
    return distance > metres if metres > 0 else distance < metres


def _lifted(start: Info, end: Info, block: str, metres: float, link: str) -> bool:
    """Raised off a part of the table by a robot that is all it touches."""
    before, after = _block(start, block), _block(end, block)
    return (
        _moved(before, after)[2] > metres
        and _bodies(after) == {_robot(start)}
        and _table(start, link) in _links(before)
    )


def _placed(start: Info, end: Info, link: str) -> bool:
    """What the robot held, touching nothing else, now lies on a part of the table, let go."""
    held = _bodies(start["robot_info"])
    # The task begins with one thing in the hand and ends with the hand off it.
    if len(held) != 1 or held & _bodies(end["robot_info"]):
        return False
    blocks = start["scene_info"]["movable_objects"]
    names = [name for name, block in blocks.items() if block["uid"] in held]
    # The one body in contact may also be the table, which cannot be placed.
    if len(names) != 1:
        return False
    after = end["scene_info"]["movable_objects"][names[0]]
    return _bodies(blocks[names[0]]) == {_robot(start)} and _table(end, link) in _links(after)


def _pushed_into(start: Info, end: Info, source: str, target: str) -> bool:
    """A block that touched only `source` now touches `target`.

    CALVIN means to forbid the robot's touch at the end as well, but compares a body with pairs of
    body and link, which never agree; so it does not, and neither does this.
    """
    for block in _BLOCKS:
        before, after = _links(_block(start, block)), _links(_block(end, block))
        if before == {_table(start, source)} and _table(end, target) in after:
            return True
    return False


def _slid(start: Info, end: Info, joint: str, metres: float) -> bool:
    """A door or the drawer moved by more than `metres`, in its direction."""
    before = start["scene_info"]["doors"][joint]["current_state"]
    distance = end["scene_info"]["doors"][joint]["current_state"] - before
    return distance > metres if metres > 0 else distance < metres


def _switched(start: Info, end: Info, lamp: str, before: int, after: int) -> bool:
    lamps = start["scene_info"]["lights"], end["scene_info"]["lights"]
    return [state[lamp]["logical_state"] for state in lamps] == [before, after]


def _stacked(start: Info, end: Info) -> bool:
    """A block that touched none now rests on blocks alone."""
    return _changed_stack(start, end, of=end)


def _unstacked(start: Info, end: Info) -> bool:
    """A block that rested on blocks alone now touches none."""
    return _changed_stack(end, start, of=start)


def _changed_stack(free: Info, stacked: Info, of: Info) -> bool:
    """Whether a block free in one info is stacked, and nearly at rest, in the other."""
    blocks = free["scene_info"]["movable_objects"]
    uids = {block["uid"] for block in blocks.values()}
    for name in blocks:
        alone = _bodies(free["scene_info"]["movable_objects"][name])
        touching = _bodies(stacked["scene_info"]["movable_objects"][name])
        block = of["scene_info"]["movable_objects"][name]
        speeds = np.abs([block["current_lin_vel"], block["current_ang_vel"]])
        # Slow (m/s, rad/s), so that a block tumbling over another is not taken for a stacked one.
        if not uids & alone and touching and touching <= uids and (speeds < 1).all():
            return True
    return False


def _block(info: Info, name: str) -> Info:
    return info["scene_info"]["movable_objects"]["block_" + name]


def _robot(info: Info) -> int:
    return info["robot_info"]["uid"]


def _table(info: Info, link: str) -> Tuple[int, int]:
    table = info["scene_info"]["fixed_objects"]["table"]
    return table["uid"], table["links"][link]


def _bodies(item: Info) -> Set[int]:
    """Bodies in contact with a block or the robot."""
    return {contact[2] for contact in item["contacts"]}


def _links(item: Info, without: int = -1) -> Set[Tuple[int, int]]:
    """(body, link) in contact, but for those of the body `without`."""
    return {(contact[2], contact[4]) for contact in item["contacts"] if contact[2] != without}


def _moved(before: Info, after: Info) -> np.ndarray:
    """Displacement [3] in meters."""
    return np.subtract(after["current_pos"], before["current_pos"])


def _turn(before: Any, after: Any) -> Tuple[float, float, float]:
    """Roll, pitch, yaw in degrees (fixed axes) that turn quaternion `before` xyzw into `after`."""
    ax, ay, az, aw = np.divide(after, np.linalg.norm(after))
    # Inverse of the first rotation: a unit quaternion's conjugate.
    bx, by, bz, bw = np.divide(before, np.linalg.norm(before)) * (-1, -1, -1, 1)
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    w = aw * bw - ax * bx - ay * by - az * bz
    roll = math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    # Rounding can push the sine just beyond 1, where asin raises.
    pitch = math.asin(max(-1.0, min(1.0, 2 * (w * y - z * x))))
    yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return math.degrees(roll), math.degrees(pitch), math.degrees(yaw)


def _tasks() -> Dict[str, Tuple[Callable[..., Any], Tuple[Any, ...]]]:
    tasks: Dict[str, Tuple[Callable[..., Any], Tuple[Any, ...]]] = {}
    for block in _BLOCKS:
        # Degrees about the vertical axis, which points up: to the right is negative.
        tasks["rotate_{}_block_right".format(block)] = (_rotated, (block, -60))
        tasks["rotate_{}_block_left".format(block)] = (_rotated, (block, 60))
    for block in _BLOCKS:
        tasks["push_{}_block_right".format(block)] = (_pushed, (block, 0.1))
        tasks["push_{}_block_left".format(block)] = (_pushed, (block, -0.1))
    tasks["move_slider_left"] = (_slid, ("base__slide", 0.15))
    tasks["move_slider_right"] = (_slid, ("base__slide", -0.15))
    tasks["open_drawer"] = (_slid, ("base__drawer", 0.12))
    tasks["close_drawer"] = (_slid, ("base__drawer", -0.12))
    for block in _BLOCKS:
        tasks["lift_{}_block_table".format(block)] = (_lifted, (block, 0.05, "base_link"))
        tasks["lift_{}_block_slider".format(block)] = (_lifted, (block, 0.03, "plank_link"))
        tasks["lift_{}_block_drawer".format(block)] = (_lifted, (block, 0.05, "drawer_link"))
    tasks["place_in_slider"] = (_placed, ("plank_link",))
    tasks["place_in_drawer"] = (_placed, ("drawer_link",))
    tasks["stack_block"] = (_stacked, ())
    tasks["unstack_block"] = (_unstacked, ())
    tasks["turn_on_lightbulb"] = (_switched, ("lightbulb", 0, 1))
    tasks["turn_off_lightbulb"] = (_switched, ("lightbulb", 1, 0))
    tasks["turn_on_led"] = (_switched, ("led", 0, 1))
    tasks["turn_off_led"] = (_switched, ("led", 1, 0))
    tasks["push_into_drawer"] = (_pushed_into, ("base_link", "drawer_link"))
    return tasks


TASKS = _tasks()
