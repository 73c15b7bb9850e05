"""Small policies with visible behaviour, to test everything around a real one."""

import threading
import time
from typing import Any

import numpy as np

from vla_jax.config.observation import ObservationConfig
from vla_jax.inference.protocol import IMAGE_KEYS, STATE_KEY, ObservationError
from vla_jax.inference.robot_keys import RobotKeys

CHUNK, ACTION_DIM = 4, 7


# A process that serves: `python -c SERVE PORT SECONDS`, and says when.
SERVE = (
    "import sys\n"
    "from tests.serve.fakes import CountingPolicy\n"
    "from vla_jax.serve import server\n"
    "policy = CountingPolicy(float(sys.argv[2]))\n"
    "options = server.ServerOptions(port=int(sys.argv[1]))\n"
    "server.run(policy, options, lambda uri: print('listening on', uri, flush=True))\n"
)


class CountingPolicy:
    """actions[i] = [session number, steps so far in this session, i, mean of the image, 0...]."""

    def __init__(self, seconds: float = 0.0, fail_on: str = "") -> None:
        self.metadata: dict[str, Any] = {
            "model": "counting",
            "cameras": {"primary": "observation/image"},
            "chunk": CHUNK,
            "action_dim": ACTION_DIM,
            "hz": 10.0,
        }
        self.seconds = seconds
        self.fail_on = fail_on
        self.warm = False
        self.sessions = 0
        self.threads: set[str] = set()

    def warmup(self) -> None:
        self.warm = True

    def new_session(self) -> dict[str, int]:
        self.sessions += 1
        return {"number": self.sessions, "steps": 0}

    def check(self, obs: dict[str, Any]) -> None:
        problems = []
        image = obs.get("observation/image")
        if not isinstance(image, np.ndarray):
            problems.append("observation/image: missing")
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            problems.append(f"observation/image: {image.dtype} {image.shape}, not uint8 [h, x, 3]")
        if not isinstance(obs.get("prompt"), str):
            problems.append("prompt: missing")
        if problems:
            legal = "observation/image, prompt"
            raise ObservationError("; ".join(problems) + f"; legal keys: {legal}")

    def infer(self, session: dict[str, int], obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        self.threads.add(threading.current_thread().name)
        if self.fail_on and self.fail_on in obs["prompt"]:
            raise ArithmeticError(f"told to fail on {self.fail_on!r}")
        time.sleep(self.seconds)
        session = {"number": session["number"], "steps": session["steps"] + 1}
        actions = np.zeros((CHUNK, ACTION_DIM), np.float32)
        actions[:, 0] = session["number"]
        actions[:, 1] = session["steps"]
        actions[:, 2] = np.arange(CHUNK)
        actions[:, 3] = obs["observation/image"].mean()
        if obs["prompt"] == "nan":
            actions[0, 0] = np.nan
        return {"actions": actions}, session


class RobotPolicy(CountingPolicy):
    """Looks for a robot's own keys, and for all cameras and numbers of state that it names."""

    def __init__(self, profile: str, cameras: tuple[str, ...], state: int, actions: int = 7):
        super().__init__()
        self.keys = RobotKeys(ObservationConfig(profile))
        self.cameras, self.state, self.actions = cameras, state, actions
        self.metadata |= {"action_dim": actions, "observation": self.keys.to_json()}
        self.metadata["cameras"] = {camera: IMAGE_KEYS[camera] for camera in cameras}

    def check(self, obs: dict[str, Any]) -> None:
        obs = self.keys.standardize(obs, self.state)
        missing = [
            f"{self.keys.image_names(camera)}: missing ({camera} camera)"
            for camera in self.cameras
            if IMAGE_KEYS[camera] not in obs
        ]
        if self.state and obs.get(STATE_KEY, np.zeros(0)).shape != (self.state,):
            missing.append(f"{self.keys.state_names()}: expected {self.state} numbers")
        if missing:
            raise ObservationError("; ".join(missing))
        super().check(obs)

    def infer(self, session: dict[str, int], obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        reply, session = super().infer(session, self.keys.standardize(obs, self.state))
        return {"actions": np.resize(reply["actions"], (CHUNK, self.actions))}, session


class BatchCountingPolicy(CountingPolicy):
    """The same for several sessions at once; a pass takes as long as for one."""

    def __init__(self, max_batch: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.max_batch = max_batch
        self.batches: list[int] = []

    def infer(self, session: dict[str, int], obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        self.batches.append(1)
        return super().infer(session, obs)

    def infer_many(self, sessions: Any, observations: Any) -> list[tuple[dict[str, Any], Any]]:
        assert 1 < len(sessions) <= self.max_batch
        assert len({session["number"] for session in sessions}) == len(sessions)
        self.batches.append(len(sessions))
        seconds, self.seconds = self.seconds, 0.0
        try:
            time.sleep(seconds)
            pairs = zip(sessions, observations, strict=True)
            return [super(BatchCountingPolicy, self).infer(s, o) for s, o in pairs]
        finally:
            self.seconds = seconds
