"""What two simulators' oracles say of all tasks at once."""

from __future__ import annotations

from typing import Any

from eval_servers.calvin import oracle
from eval_servers.tabletop import tasks


def achieved(start: oracle.Info, end: oracle.Info) -> set[str]:
    """All tasks of CALVIN solved between two infos."""
    return {task for task in oracle.TASKS if oracle.solved(task, start, end)}


def solved_tasks(start_info: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """Names of all tasks done between the two infos."""
    return [task for task in tasks.TASKS if tasks.solved(task, start_info, info)]


def startable(task: str, info: dict[str, Any]) -> bool:
    """Whether the task makes sense in this state: it can be done and is not done already.

    For choosing the next task of a chain that goes on without a reset.

    Raises:
        ValueError: if there is no such task.
    """
    kind, words = tasks.parse(task)
    scene = info["scene_info"]
    if kind == "lift":
        return bool(scene["blocks"][words[0]]["pos"][2] <= tasks.LIFT_HEIGHT)
    if kind == "place":
        block = scene["blocks"][words[0]]
        # A held block may be placed on the pad it hangs over.
        return block["held"] or not tasks.on_pad(block["pos"], words[1])
    if kind == "led":
        return scene["led"] != (words[0] == "on")
    return bool(scene["slider"] > 0.5) == (words[0] == "left")
