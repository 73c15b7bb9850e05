"""A CALVIN of two lamps, for rollout tests without calvin_env; importable by spawned workers."""

import os
import signal

import numpy as np

from eval_servers.calvin import chains
from eval_servers.calvin.env import CalvinEnv
from eval_servers.calvin.initial import LED, LIGHTBULB, State
from tests.serve.fakes import CountingPolicy

DARK = State(0, 0, "left", "open", "table", "slider_left", "slider_right", 0)
LAMPS = ("turn_on_led", "turn_on_lightbulb", "turn_off_led", "turn_off_lightbulb")


# Words of an instruction -> the element of the action to set, and to what.
KNOWN = {"on the led": (0, 1.0), "off the led": (0, -1.0), "on the light": (1, 1.0)}


class FakeSimulator:
    """Element 0 of an action switches the LED, element 1 the bulb: above 0.5 on, below -0.5 off."""

    driver = "none"

    def reset(self, robot, scene):
        self._robot, self._scene = robot, scene.copy()
        return self._obs()

    def step(self, action):
        for value, field in zip(action[:2], (LED, LIGHTBULB), strict=True):
            if abs(value) > 0.5:
                self._scene[field] = value > 0
        return self._obs(), self.info()

    def info(self):
        lamps = {"led": self._scene[LED], "lightbulb": self._scene[LIGHTBULB]}
        lights = {name: {"logical_state": int(state)} for name, state in lamps.items()}
        return {"robot_info": {"uid": 0, "contacts": []}, "scene_info": {"lights": lights}}

    def close(self):
        pass

    def _obs(self):
        views = {"rgb_static": np.full((200, 200, 3), 90), "rgb_gripper": np.full((84, 84, 3), 30)}
        return {"rgb_obs": views, "robot_obs": self._robot, "scene_obs": self._scene}


def make_env(crash_on=-1):
    env = CalvinEnv(FakeSimulator())
    if crash_on >= 0:
        reset = env.reset

        def reset_or_die(episode):
            if episode.index == crash_on:
                os.kill(os.getpid(), signal.SIGSEGV)
            return reset(episode)

        env.reset = reset_or_die
    return env


def make_chain(index, tasks, state=DARK):
    message = chains.load().instructions
    instructions = tuple(message[task] for task in tasks)
    return chains.Chain(index, 7, chains.CHAIN, instructions[0], state, tasks, instructions)


class LampPolicy(CountingPolicy):
    """Does as it is told at its third step; does not know how to turn the bulb off."""

    def __init__(self, gripper=1.0):
        super().__init__()
        self.gripper = gripper
        self.prompts = []
        cameras = {"primary": "observation/image", "wrist": "observation/wrist_image"}
        self.metadata = {**self.metadata, "cameras": cameras}

    def infer(self, session, obs):
        assert set(obs) == {"observation/image", "observation/wrist_image", "prompt"}
        assert obs["observation/wrist_image"].shape == (84, 84, 3)
        reply, session = super().infer(session, obs)
        actions = np.zeros_like(reply["actions"])
        actions[:, 6] = self.gripper
        self.prompts.append(obs["prompt"])
        for words, (element, value) in KNOWN.items():
            if words in obs["prompt"] and session["steps"] == 3:
                actions[0, element] = value
        return {"actions": actions}, session
