"""LIBERO behind the interface of `eval_servers.rollout`."""

from __future__ import annotations

import functools
from typing import Any, Callable, ClassVar, Dict, List, Optional, Set, Tuple

import numpy as np

from eval_servers import rollout, video
from eval_servers.libero.profiles import Profile
from eval_servers.libero.simulator import CAMERAS, Settings, Simulator
from eval_servers.libero.suites import Trial

SCENE_KEY = "observation/scene"  # privileged: see `Simulator.scene`, float [3, 3]
_FILMED = 80  # pictures of a film at most: each takes a tenth of a second to draw


class LiberoEnv(rollout.Env):
    """One simulator.

    Attributes:
        gripper: the commands it takes; the other way round than elsewhere here.
        arm_range: of the data's actions.
    """

    gripper: ClassVar[Dict[str, float]] = {"closed": 1.0, "open": -1.0}
    arm_range: ClassVar[Tuple[float, float]] = (-1.0, 1.0)

    def __init__(self, simulator: Any, profile: Profile, privileged: bool = False) -> None:
        """Take over a `Simulator`.

        Args:
            simulator: to use, and to close.
            profile: see `Profile`.
            privileged: let observations hold where things are as well, for scripted experts.
        """
        self._simulator, self._profile, self._privileged = simulator, profile, privileged

    def reset(self, episode: Trial) -> Dict[str, Any]:
        """The trial's initial state, after the steps in which things come to rest."""
        profile = self._profile
        self._simulator.reset(
            episode.suite, episode.task, profile.seed, episode.seed, profile.settle
        )
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        """One control step; robosuite clips the arm's numbers, and takes any of the fingers'."""
        if action.shape != (7,) or not np.isfinite(action).all() or abs(action[6]) > 1:
            raise rollout.ActionError(
                "the policy does not fit LIBERO: an action is 7 finite numbers, the last from -1"
                " (open) to 1 (closed), not {}".format(np.round(action, 3).tolist())
            )
        self._simulator.step(action)

    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        """The robot's state, float32 [8], and of both pictures those that are asked for."""
        obs: Dict[str, Any] = {}
        for camera in CAMERAS:
            # A picture costs more than a control step, so unwanted ones are not drawn.
            if keys is None or "observation/" + camera in keys:
                obs["observation/" + camera] = self._simulator.draw(camera)
        obs["observation/state"] = self._simulator.state()
        if self._privileged:
            obs[SCENE_KEY] = self._simulator.scene()
        return obs

    def success(self) -> bool:
        """Whether all of the task's goals hold now."""
        return self._simulator.solved()

    def frame(self) -> Callable[[], np.ndarray]:
        """Draws what is seen now, whenever it is called within this episode."""
        # Most episodes become no film, so a state is kept here and drawn only when one does.
        return functools.partial(_drawn, self._simulator, self._simulator.snapshot())

    def close(self) -> None:
        """Let go of the simulator."""
        self._simulator.close()


def make_env(settings: Settings, profile: Profile, privileged: bool = False) -> LiberoEnv:
    """Build it in the process that will use it."""
    return LiberoEnv(Simulator(settings), profile, privileged)


def film(path: str, frames: List[Callable[[], np.ndarray]]) -> None:
    """Draw an episode that is worth a video; the last frame is always in it."""
    # Rounded up, so that no film has more than `_FILMED` pictures.
    stride = -(-len(frames) // _FILMED)
    # Counted from the end, where success or failure is seen.
    # The simulator takes 20 control steps a second, so the film plays in real time.
    video.save_video(path, [frame() for frame in frames[::-1][::stride][::-1]], 20.0 / stride)


def _drawn(simulator: Any, snapshot: Any) -> np.ndarray:
    """Both views side by side."""
    return np.concatenate([simulator.draw(camera, snapshot) for camera in CAMERAS], axis=1)
