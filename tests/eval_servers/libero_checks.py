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

from eval_servers.libero import suites
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
        seen = []
        for action in [None, *ACTIONS]:
            if action is not None:
                obs, _, _, _ = env.step(action)
            seen += [obs[name + "_image"][::-1, ::-1] for name in CAMERAS.values()]
            seen += [obs[f"robot0_{name}"] for name in ("eef_pos", "gripper_qpos", "joint_pos")]
        yield digest(seen), env.sim.get_state().flatten().copy(), env.sim.model.body_pos.copy()
    env.close()


def our_episodes(suite, number, order):
    world = Simulator(Settings("egl", SIZE))
    for trial in order:
        world.reset(suite, suites.tasks(suite)[number].name, SEED, trial, 10)
        sim = world._env.env.sim
        seen = []
        for action in [None, *ACTIONS]:
            if action is not None:
                world.step(action)
            seen += [world.draw(name) for name in CAMERAS]
            seen += [world._obs[f"robot0_{n}"] for n in ("eef_pos", "gripper_qpos", "joint_pos")]
        yield digest(seen), sim.get_state().flatten().copy(), sim.model.body_pos.copy()
    world.close()


def stock(suite, number):
    """Whether three episodes, begun with the last, are the stock environment's to the bit."""
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = list(stock_episodes(suite, number))
    order = [2, 0, 1, 2]
    ours = list(our_episodes(suite, number, order))
    return {
        "pixels": [ours[i][0] == theirs[trial][0] for i, trial in enumerate(order)],
        "state": max(off(ours[i][1], theirs[trial][1]) for i, trial in enumerate(order)),
        "fixtures": max(off(ours[i][2], theirs[trial][2]) for i, trial in enumerate(order)),
        "moved": max(off(theirs[0][2], other[2]) for other in theirs[1:]),
    }


def every_task(suite, numbers):
    """Each task made, settled, stepped and drawn, twice."""
    world, found = Simulator(Settings("egl", SIZE)), {}
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
        found[number] = {
            "repeats": twice[0] == twice[1], "solved": any(solved), "blank": any(blank),
            "pictures": twice[0][0], "state": twice[0][1],
        }  # fmt: skip
    world.close()
    return found


def files():
    """Names, files and sentences that differ from LIBERO's; should be empty."""
    from libero.libero import benchmark, get_libero_path  # type: ignore[import-not-found]

    wrong = []
    for suite in suites.SUITES:
        with contextlib.redirect_stdout(io.StringIO()):
            listed = benchmark.get_benchmark("libero_" + suite)()
        kind = suites.perturbation(suite)
        for number, (name, told) in enumerate(suites.tasks(suite)):
            path = os.path.join(get_libero_path("bddl_files"), "libero_" + suite, name + ".bddl")
            theirs = listed.get_task(number).language
            if kind in ("lan", "task"):
                with open(path, encoding="utf-8") as file:
                    match = re.search(r"\(:language\s+(.*?)\)", file.read(), re.S)
                theirs = match.group(1).strip() if match else ""
            states = listed.get_task_init_states(number)
            if listed.get_task(number).name != name or theirs != told or len(states) < 50:
                wrong.append([suite, number, told, theirs, len(states)])
    return wrong


def cost(number, steps):
    """CPU-seconds of an episode that draws at every step and of one that draws when asked."""
    told = {}
    world = Simulator(Settings("egl", 256))
    world.reset("spatial", suites.tasks("spatial")[number].name, SEED, 0, 10)
    for every in (1, 5):
        start = time.process_time()
        settling = 10 if every > 1 else 0
        world.reset("spatial", suites.tasks("spatial")[number].name, SEED, 0, settling)
        for step in range(steps + (10 if every == 1 else 0)):
            if step % every == 0:
                [world.draw(name) for name in CAMERAS]
            world.step(STAY)
        told[every] = time.process_time() - start
    world.close()
    return {"every step": told[1], "when asked": told[5], "ratio": told[5] / told[1]}


def digest(arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def off(a, b):
    return float(np.abs(a - b).max())


def main():
    what, *rest = sys.argv[1:]
    if what == "stock":
        told = stock(rest[0], int(rest[1]))
    elif what == "tasks":
        told = every_task(rest[0], [int(number) for number in rest[1:]])
    elif what == "files":
        told = files()
    else:
        told = cost(int(rest[0]), int(rest[1]))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
