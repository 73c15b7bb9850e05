"""A SimplerEnv without SAPIEN, for rollout tests; importable by spawned workers."""

from typing import Any

import numpy as np

from eval_servers.simpler.env import SimplerEnv
from eval_servers.simpler.profiles import PROFILES
from eval_servers.simpler.tasks import WIDOWX
from eval_servers.simpler.trials import trials
from tests.serve.fakes import CountingPolicy

STACK, CARROT = "widowx_stack_cube", "widowx_carrot_on_plate"
APPLE = "google_robot_place_apple_in_closed_top_drawer"


class FakeSimulator:
    """The task is done while the hand is beyond 0.1 m; the drawer opens at 0.2 m.

    Attributes:
        built: worlds, in the order they were built.
        told: actions since the last reset.
    """

    def __init__(self, says=None):
        self.built, self.told, self._says = [], [], says
        self._world: Any = None

    def reset(self, world, start):
        if world != self._world:
            self.built.append(world)
            self._world = world
        self._hand, self.told, self._second = 0.0, [], False
        self._start = start
        return self.picture()

    def step(self, action):
        self.told.append(action)
        self._hand += action[0]
        return self.picture()

    def picture(self):
        number = self._start.episode or 0
        return np.full((48, 64, 3), 40 + number, np.uint8) + np.arange(64, dtype=np.uint8)[:, None]

    def success(self):
        return self._hand > 0.1

    def stats(self):
        return {"moved": np.bool_(self._hand > 0.05), "is_drawer_open": self._hand > 0.2,
                "qpos": f"{self._hand:.3f}"}  # fmt: skip

    def instruction(self):
        if self._says is not None:
            return self._says
        if self._world.gym.startswith("Place"):
            return "place apple into top drawer" if self._second else "open top drawer"
        words = {
            "Stack": "stack the green block on the yellow block",
            "PutCa": "put carrot on plate",
        }
        return words[self._world.gym[:5]]

    def advance(self):
        self._second = True

    def scene(self):
        return np.zeros((3, 3), np.float32)

    def close(self):
        pass


def make_env(profile=PROFILES["robovlms"], robot=WIDOWX):
    return SimplerEnv(FakeSimulator(), robot, profile)


def make_trials(count=3, tasks=(STACK,), setting="visual_matching"):
    return trials(list(tasks), setting, count)


class PushingPolicy(CountingPolicy):
    """Pushes 0.03 m a step, the green block only; after `back` steps it pulls as far back."""

    def __init__(self, back=100, words="green", gripper=1.0):
        super().__init__()
        self.back, self.words, self.gripper = back, words, gripper
        self.prompts = []

    def infer(self, session, obs):
        assert set(obs) == {"observation/image", "prompt"}
        reply, session = super().infer(session, obs)
        self.prompts.append(obs["prompt"])
        actions = np.zeros_like(reply["actions"])
        if self.words in obs["prompt"]:
            actions[:, 0] = 0.03 if session["steps"] <= self.back else -0.03
        actions[:, 6] = self.gripper
        return {"actions": actions}, session
