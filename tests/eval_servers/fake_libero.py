"""A LIBERO without MuJoCo, for rollout tests; importable by spawned workers."""

import os
import signal

import numpy as np

from eval_servers.libero.env import LiberoEnv
from eval_servers.libero.profiles import PROFILES
from tests.serve.fakes import CountingPolicy

BASKET = np.array([0.0, 0.27, 0.07])


class FakeSimulator:
    """A hand that goes where it is told, and one thing that it can close upon and carry.

    The task is solved when the thing lies in the basket. What is drawn is the number of steps.

    Attributes:
        resets: arguments of every reset.
        drawn: cameras, in the order they were drawn.
    """

    def __init__(self):
        self.resets, self.drawn = [], []

    def reset(self, suite, task, seed, trial, settle, shipped=True):
        self.resets.append((suite, task, seed, trial, settle))
        self._hand = np.array([-0.14, 0.0, 0.27])
        self._thing = np.array([0.05, -0.1 + 0.001 * trial, 0.02])
        self._closed = self._steps = 0

    def step(self, action):
        self._steps += 1
        self._hand = self._hand + 0.02 * np.clip(action[:3], -1, 1)
        near = np.linalg.norm(self._hand - self._thing) < 0.03
        held = action[6] > 0 and (near or self._closed > 0)
        self._closed = self._closed + 1 if held else 0
        if self._closed > 5:
            self._thing = self._hand - [0, 0, 0.005]
        elif not held and self._thing[2] > 0.02:
            self._thing[2] = 0.02

    def solved(self):
        inside = np.linalg.norm((self._thing - BASKET)[:2]) < 0.05
        return bool(inside and self._thing[2] < BASKET[2] and not self._closed)

    def state(self):
        return np.concatenate([self._hand, np.zeros(5)]).astype(np.float32)

    def joints(self):
        return np.zeros(7, np.float32)

    def scene(self):
        return np.array([self._hand, self._thing, BASKET], np.float32)

    def snapshot(self):
        return self._steps

    def draw(self, camera, snapshot=None):
        self.drawn.append(camera)
        shown = self._steps if snapshot is None else snapshot
        picture = np.full((32, 32, 3), 20 + shown % 200, np.uint8)
        picture[::2] += 10 if camera == "image" else 20
        return picture

    def close(self):
        pass


def make_env(profile="openpi", crash_on=-1, privileged=True):
    env = LiberoEnv(FakeSimulator(), PROFILES[profile], privileged)
    if crash_on >= 0:
        reset = env.reset

        def reset_or_die(episode):
            if episode.index == crash_on:
                os.kill(os.getpid(), signal.SIGSEGV)
            return reset(episode)

        env.reset = reset_or_die
    return env


class StayingPolicy(CountingPolicy):
    """Keeps still with open fingers; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []
        cameras = {"primary": "observation/image", "wrist": "observation/wrist_image"}
        self.metadata = {**self.metadata, "cameras": cameras, "chunk": 5, "needs_proprio": True}

    def infer(self, session, obs):
        self.asked.append(obs)
        _, session = super().infer(session, obs)
        actions = np.zeros((5, 7), np.float32)
        actions[:, 6] = -1
        return {"actions": actions}, session
