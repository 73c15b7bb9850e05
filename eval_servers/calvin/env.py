"""calvin_env behind the interface of `eval_servers.rollout`, for chains of tasks."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Dict, List, Optional, Set, Tuple

import numpy as np

from eval_servers import rollout
from eval_servers.calvin import oracle
from eval_servers.calvin.chains import Chain, start_of
from eval_servers.calvin.simulator import Settings, Simulator
from eval_servers.episode import Chunks
from eval_servers.video import film, jpeg

__all__ = ["SCENE_KEY", "CalvinEnv", "attempt", "film", "make_env"]

SCENE_KEY = "observation/scene"  # privileged: where everything is, float [24]


class CalvinEnv(rollout.Env):
    """One simulator; chains start with `reset`, each of their tasks with `begin`.

    Attributes:
        gripper: the commands it takes.
        arm_range: of the data's actions; the simulator takes larger ones as well.
    """

    gripper: ClassVar[Dict[str, float]] = {"closed": -1.0, "open": 1.0}
    arm_range: ClassVar[Tuple[float, float]] = (-1.0, 1.0)

    def __init__(self, simulator: Any, privileged: bool = False) -> None:
        """Take over a `Simulator`.

        Args:
            simulator: to use, and to close.
            privileged: let observations hold the scene's state as well, for scripted experts.
        """
        self._simulator = simulator
        self._privileged = privileged
        self._task = ""
        self._obs: Dict[str, Any] = {}
        self._start: Dict[str, Any] = {}
        self._info: Dict[str, Any] = {}

    def reset(self, episode: Any) -> Dict[str, Any]:
        """The chain's initial state, and its first task begun."""
        # The world is reset once a chain: each later task starts where the one before it ended.
        self._obs = self._simulator.reset(*start_of(episode))
        self._info = self._simulator.info()
        self.begin(episode.tasks[0])
        return self.observe()

    def begin(self, task: str) -> None:
        """Let success count on `task` from here on."""
        self._task, self._start = task, self._info

    def step(self, action: np.ndarray) -> None:
        """One control step; arm actions are not clipped, as in CALVIN's evaluation."""
        # calvin_env asserts exactly -1 or 1, and an assertion would pass for a crash of the
        # simulator.
        if action.shape != (7,) or action[6] not in (-1, 1) or not np.isfinite(action).all():
            raise rollout.ActionError(
                "the policy does not fit CALVIN: an action is 7 finite numbers, the last -1"
                " (closed) or 1 (open), not {}".format(np.round(action, 3).tolist())
            )
        # A copy: the array may be a view of the server's message, and calvin_env wants its own.
        self._obs, self._info = self._simulator.step(np.array(action))

    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        """Both pictures and the robot's state."""
        views = self._obs["rgb_obs"]
        obs = {
            "observation/image": np.ascontiguousarray(views["rgb_static"], np.uint8),
            "observation/wrist_image": np.ascontiguousarray(views["rgb_gripper"], np.uint8),
            "observation/state": np.asarray(self._obs["robot_obs"], np.float32),
        }
        if self._privileged:
            obs[SCENE_KEY] = np.asarray(self._obs["scene_obs"], np.float32)
        return obs

    def success(self) -> bool:
        """Whether the oracle sees the task done since it was begun."""
        return oracle.solved(self._task, self._start, self._info)

    def frame(self) -> bytes:
        """Both views side by side, as JPEG: a chain may have 1800 of them."""
        views = self._obs["rgb_obs"]
        static, gripper = (np.asarray(views[k], np.uint8) for k in ("rgb_static", "rgb_gripper"))
        picture = np.zeros((len(static), static.shape[1] + gripper.shape[1], 3), np.uint8)
        picture[:, : static.shape[1]] = static
        picture[: len(gripper), static.shape[1] :] = gripper
        return jpeg(picture)

    def close(self) -> None:
        """Let go of the simulator."""
        self._simulator.close()


def make_env(settings: Settings, privileged: bool = False) -> CalvinEnv:
    """Build the simulator, in the process that will use it."""
    return CalvinEnv(Simulator(settings), privileged)


def attempt(
    env: Any,
    client: Any,
    chunks: Chunks,
    episode: Chain,
    max_steps: int,
    frames: Optional[List[Any]],
) -> rollout.Outcome:
    """One try at a chain: each task a fresh session and `max_steps`, until one fails.

    Also run when a dropped connection makes the episode start over: all tasks are tried anew.
    """
    stages: List[rollout.Stage] = []
    for number, task in enumerate(episode.tasks):
        instruction = episode.instructions[number]
        env.begin(task)
        since, solved, steps = time.monotonic(), False, 0
        for _ in rollout.control_steps(env, client, chunks, instruction, max_steps, frames):
            steps += 1
            solved = env.success()
            if solved:
                break
        seconds = round(time.monotonic() - since, 3)
        stages.append(rollout.Stage(task, solved, steps, seconds))
        if not solved:
            break
    solved = len(stages) == len(episode.tasks) and stages[-1].success
    return rollout.Outcome(solved, sum(stage.steps for stage in stages), tuple(stages))
