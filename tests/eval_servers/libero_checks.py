"""What LIBERO's own environment gives against ours; prints JSON, in LIBERO's Python.

python -m tests.eval_servers.libero_checks stock SUITE NUMBER     # sequence of three episodes
python -m tests.eval_servers.libero_checks tasks SUITE [NUMBER ...]    # every task, twice
python -m tests.eval_servers.libero_checks files           # our tables against LIBERO's files
python -m tests.eval_servers.libero_checks cost NUMBER STEPS     # CPU-seconds of an episode
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time

import numpy as np

from eval_servers.client import PolicyClient
from eval_servers.episode import run_episode
from eval_servers.libero import suites
from eval_servers.libero.env import LiberoEnv
from eval_servers.libero.profiles import PROFILES
from eval_servers.libero.simulator import CAMERAS, STAY, Settings, Simulator

EPISODES, STEPS, SEED, SIZE = 3, 12, 7, 128
ACTIONS = np.random.RandomState(0).uniform(-1, 1, (STEPS, 7))


def stock_episodes(suite, number, episodes=EPISODES):
    """Openpi's sequence in LIBERO's own environment: model loaded anew, drawn at every step."""
    from libero.libero import benchmark, envs  # type: ignore[import-not-found]

    listed = benchmark.get_benchmark("libero_" + suite)()
    np.random.seed(SEED)
    env = envs.OffScreenRenderEnv(
        bddl_file_name=listed.get_task_bddl_file_path(number),
        camera_heights=SIZE,
        camera_widths=SIZE,
    )
    env.seed(SEED)
    for trial in range(episodes):
        env.reset()
        obs = env.set_init_state(listed.get_task_init_states(number)[trial])
        for _ in range(10):
            obs, _, _, _ = env.step(STAY.tolist())
        recorded = []
        for action in [None, *ACTIONS]:
            if action is not None:
                obs, _, _, _ = env.step(action)
            recorded += [obs[name + "_image"][::-1, ::-1] for name in CAMERAS.values()]
            recorded += [obs[f"robot0_{name}"] for name in ("eef_pos", "gripper_qpos", "joint_pos")]
        yield digest(recorded), env.sim.get_state().flatten().copy(), env.sim.model.body_pos.copy()
    env.close()


def our_episodes(suite, number, order):
    world = Simulator(Settings("egl", SIZE))
    for trial in order:
        world.reset(suite, suites.tasks(suite)[number].name, SEED, trial, 10)
        sim = world._env.env.sim
        recorded = []
        for action in [None, *ACTIONS]:
            if action is not None:
                world.step(action)
            recorded += [world.draw(name) for name in CAMERAS]
            recorded += [
                world._obs[f"robot0_{n}"] for n in ("eef_pos", "gripper_qpos", "joint_pos")
            ]
        yield digest(recorded), sim.get_state().flatten().copy(), sim.model.body_pos.copy()
    world.close()


def stock(suite, number):
    """Whether three episodes, begun with the last, are the stock environment's to the bit."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = list(stock_episodes(suite, number))
    order = [2, 0, 1, 2]
    ours = list(our_episodes(suite, number, order))
    return {
        "pixels": [ours[i][0] == reference[trial][0] for i, trial in enumerate(order)],
        "state": max(off(ours[i][1], reference[trial][1]) for i, trial in enumerate(order)),
        "fixtures": max(off(ours[i][2], reference[trial][2]) for i, trial in enumerate(order)),
        "moved": max(off(reference[0][2], other[2]) for other in reference[1:]),
    }


def every_task(suite, numbers):
    """Each task made, settled, stepped and drawn, twice."""
    world, collected = Simulator(Settings("egl", SIZE)), {}
    for number in numbers or range(len(suites.tasks(suite))):
        twice, solved = [], []
        for _ in range(2):
            world.reset(suite, suites.tasks(suite)[number].name, SEED, 0, 10)
            solved.append(world.solved())
            for action in ACTIONS[:10]:
                world.step(action)
            pictures = [world.draw(name) for name in CAMERAS]
            twice.append((digest(pictures), digest([world._env.env.sim.get_state().flatten()])))
            blank = [picture.std() < 2 for picture in pictures]
        collected[number] = {
            "repeats": twice[0] == twice[1], "solved": any(solved), "blank": any(blank),
            "pictures": twice[0][0], "state": twice[0][1],
        }  # fmt: skip
    world.close()
    return collected


def files():
    """Names, files and sentences that differ from LIBERO's; should be empty."""
    from libero.libero import benchmark, get_libero_path  # type: ignore[import-not-found]

    wrong = []
    for suite in suites.SUITES:
        with contextlib.redirect_stdout(io.StringIO()):
            listed = benchmark.get_benchmark("libero_" + suite)()
        kind = suites.perturbation(suite)
        for number, (name, message) in enumerate(suites.tasks(suite)):
            path = os.path.join(get_libero_path("bddl_files"), "libero_" + suite, name + ".bddl")
            reference = listed.get_task(number).language
            if kind in ("lan", "task"):
                with open(path, encoding="utf-8") as file:
                    match = re.search(r"\(:language\s+(.*?)\)", file.read(), re.S)
                reference = match.group(1).strip() if match else ""
            states = listed.get_task_init_states(number)
            if listed.get_task(number).name != name or reference != message or len(states) < 50:
                wrong.append([suite, number, message, reference, len(states)])
    return wrong


def cost(number, steps, uri=""):
    """CPU-seconds of this process for one episode of a policy that is asked every five steps.

    Drawn at every step, as the stock environment does; drawn when asked; and the latter with a
    policy server behind a socket instead of a function.
    """
    trial, profile = suites.trials("spatial", [number], 1)[0], PROFILES["openpi"]
    simulator = Simulator(Settings("egl", profile.size))
    env = LiberoEnv(simulator, profile)
    env.reset(trial)  # building the world is no part of an episode

    class Drawing(LiberoEnv):
        def step(self, action):
            super().step(action)
            self.observe()

    class Still:
        metadata = {"chunk": 5}  # noqa: RUF012

        def reset(self):
            pass

        def infer(self, request):
            return {"actions": np.tile(STAY, (5, 1))}

    def seconds(env, client, settling=0):
        start = time.process_time()
        for _ in range(settling):  # the stock environment draws these steps as well
            env.observe()
        run_episode(env, client, trial, steps, profile.execute_steps)
        return time.process_time() - start

    answers = {
        "every step": seconds(Drawing(simulator, profile), Still(), profile.settle),
        "when asked": seconds(env, Still()),
    }
    answers["ratio"] = answers["when asked"] / answers["every step"]
    if uri:
        with PolicyClient(uri) as client:

            class Asking(Still):
                # What it answers is not done: another motion would cost the simulator other time.
                def infer(self, request):
                    client.infer(request)
                    return super().infer(request)

            answers["with a server"] = seconds(env, Asking())
        answers["overhead"] = answers["with a server"] / answers["when asked"] - 1
    env.close()
    return answers


def digest(arrays):
    result = hashlib.sha256()
    for array in arrays:
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()[:16]


def off(a, b):
    return float(np.abs(a - b).max())


def main():
    case, *remainder = sys.argv[1:]
    if case == "stock":
        message = stock(remainder[0], int(remainder[1]))
    elif case == "tasks":
        message = every_task(remainder[0], [int(number) for number in remainder[1:]])
    elif case == "files":
        message = files()
    else:
        message = cost(int(remainder[0]), int(remainder[1]), *remainder[2:])
    print(json.dumps(message))


if __name__ == "__main__":
    main()
