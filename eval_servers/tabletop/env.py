"""The tabletop as an environment: reset, step, observations with two camera images."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from eval_servers.tabletop import render, tasks
from eval_servers.tabletop.world import World


class TabletopEnv:
    """A table with three blocks, two pads, a lamp with its button, and a slider.

    Observations are {"rgb_static": uint8 [H, W, 3], "rgb_gripper": uint8 [H', W', 3],
    "robot_obs": float32 [15]}. `robot_obs` has CALVIN's layout: tool point x, y, z (meters),
    roll, pitch, yaw (radians, the first two 0), gripper opening (meters), seven zeros (CALVIN's
    arm joints; there is no arm here), last gripper command (-1 or +1).

    Args:
        image_size: height = width of both images in pixels, or (static, gripper).

    Raises:
        ValueError: if a size is not a positive whole number.
    """

    def __init__(self, image_size: int | tuple[int, int] = 64):
        sizes = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        # Below 8 pixels a block is smaller than a pixel.
        if len(sizes) != 2 or any(int(s) != s or s < 8 for s in sizes):
            raise ValueError(
                f"image_size must be a whole number >= 8 or (static, gripper), got {image_size!r}"
            )
        self.static_size, self.gripper_size = (int(s) for s in sizes)
        self.task: str | None = None
        self._world: World | None = None

    def reset(self, seed: int, task: str | None = None) -> dict[str, np.ndarray]:
        """Start over; the same seed gives the same blocks and tool whatever the task.

        Args:
            seed: whole number.
            task: one of `tasks.TASKS`: slider and LED are set so that it is possible and not yet
                done. None: any state.

        Raises:
            ValueError: if there is no such task.
        """
        # RandomState's stream is frozen for good, Generator's is not (numpy NEP 19).
        rng = np.random.RandomState(int(seed) % 2**32)
        self._world = World(tasks.initial_conditions(task, rng))
        self.task = task
        return self.get_obs()

    def step(self, action: Sequence[float] | np.ndarray) -> dict[str, np.ndarray]:
        """One control step; see `World.step` for the action's meaning and what is refused.

        Returns:
            The observation afterwards.
        """
        self.act(action)
        return self.get_obs()

    def act(self, action: Sequence[float] | np.ndarray) -> None:
        """`step` without drawing."""
        self._state().step(action)

    def get_obs(self) -> dict[str, np.ndarray]:
        """The observation of the current state."""
        info = self.get_info()
        robot = info["robot_info"]
        robot_obs = np.zeros(15, np.float32)
        # Fields 7 to 13 stay zero: they are CALVIN's arm joints, and there is no arm.
        robot_obs[:3], robot_obs[3:6] = robot["tcp_pos"], robot["tcp_orn"]
        robot_obs[6], robot_obs[14] = robot["gripper_opening_width"], robot["gripper_action"]
        return {
            "rgb_static": render.render(info, "static", self.static_size),
            "rgb_gripper": render.render(info, "gripper", self.gripper_size),
            "robot_obs": robot_obs,
        }

    def get_info(self) -> dict[str, Any]:
        """The state as nested plain data, for the oracles in `tasks`; see `World.get_info`."""
        return self._state().get_info()

    def _state(self):
        if self._world is None:
            raise RuntimeError("call reset(seed, task) first")
        return self._world
