"""A one-dimensional world for rollout tests, importable by spawned workers."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from eval_servers import rollout

TASKS = ("up", "down", "still")


class FakeEnv(rollout.Env):
    """Solved once the action's image-mean channel has been seen `seed % 5 + 1` times.

    Task "down" is never solved. `trouble` maps an episode's index to a misfortune that strikes
    while the file `trouble_dir/index` lacks its number of lines. A step takes `pace` seconds.
    """

    def __init__(self, trouble_dir="", trouble=None, extra_import="", pace=0.0):
        self._trouble_dir, self._trouble, self._pace = trouble_dir, trouble or {}, pace
        if extra_import:
            __import__(extra_import)

    def reset(self, episode):
        self._episode, self._steps = episode, 0
        kind, times = self._trouble.get(episode.index, ("", 0))
        if kind and self._strikes(episode.index) < times:
            with open(Path(self._trouble_dir) / str(episode.index), "a") as file:
                file.write(f"{os.getpid()}\n")
            if kind == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if kind == "hang":
                time.sleep(60)
            raise {"raise": RuntimeError, "action": rollout.ActionError}[kind](f"told to {kind}")
        return self._observe()

    def step(self, action):
        assert action.shape == (7,)
        self._steps += 1
        time.sleep(self._pace)

    def observe(self, keys=None):
        return self._observe()

    def success(self):
        return self._episode.task != "down" and self._steps > self._episode.seed % 5

    def frame(self):
        return np.full((8, 8, 3), self._steps, np.uint8)

    def _strikes(self, index):
        path = Path(self._trouble_dir) / str(index)
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _observe(self):
        return {
            "observation/image": np.full((4, 4, 3), self._steps, np.uint8),
            "observation/wrist_image": np.zeros((4, 4, 3), np.uint8),
            "observation/state": np.zeros(3, np.float32),
        }


def save_text(path, frames):
    Path(path).write_text(f"{len(frames)} {frames[-1].mean():g}")
