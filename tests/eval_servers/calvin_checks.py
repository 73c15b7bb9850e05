"""Checks that need calvin_env; run by the simulator's Python, which has no pytest and no vla_jax.

python -m tests.eval_servers.calvin_checks ROOT -> one line of JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from eval_servers.calvin import chains, expert, oracle, simulator
from eval_servers.calvin.initial import initial_state
from tests.eval_servers.solved import achieved


def states(world):
    """Largest deviation of what the simulator shows after a reset from what it was reset to."""
    worst = {"robot": 0.0, "doors and lamps": 0.0, "blocks": 0.0, "yaw": 0.0}
    for state in chains.load().states:
        robot, scene = initial_state(state)
        obs = world.reset(robot, scene)
        off = np.abs(obs["scene_obs"] - scene)
        blocks = off[6:].reshape(3, 6)
        results = {
            "robot": np.abs(obs["robot_obs"][7:14] - robot[7:14]).max(),  # joints
            "doors and lamps": off[:6].max(),
            "blocks": blocks[:, :3].max(),
            "yaw": blocks[:, 5].max(),
        }
        for key, value in results.items():
            worst[key] = max(worst[key], float(value))
    return worst


def repeated(world):
    """How far a start is off after an episode that ended on the pressed button."""
    start = initial_state(next(s for s in chains.load().states if s.led))

    def seen():
        obs = world.reset(*start)
        return obs["robot_obs"], obs["scene_obs"]

    first, script, solved = seen(), expert.Expert("turn_off_led"), False
    robot, scene = first
    before = world.info()
    for _ in range(60):
        if not solved:
            obs, info = world.step(script.act(robot, scene))
            robot, scene = obs["robot_obs"], obs["scene_obs"]
            solved = oracle.solved("turn_off_led", before, info)
    robot, scene = seen()
    off = {"robot": np.abs(robot - first[0]), "scene": np.abs(scene - first[1])}
    return dict({name: float(values.max()) for name, values in off.items()}, solved=solved)


def played(world, upstream):
    """Infos along scripted and random motion: both oracles on every pair with the start."""
    compared, different, recorded = 0, [], set()
    rng = np.random.default_rng(0)
    episodes = chains.episodes_of_tasks(chains.load(), expert.TASKS, 2 * len(expert.TASKS))
    for episode in episodes:
        obs = world.reset(*initial_state(episode.state))
        start = world.info()
        script = expert.Expert(episode.task)
        for step in range(70):
            action = script.act(obs["robot_obs"], obs["scene_obs"])
            if step > 45:
                action = np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0]))
            obs, info = world.step(action)
            ours, reference = achieved(start, info), upstream.get_task_info(start, info)
            compared += 1
            recorded |= reference
            if ours != reference:
                different.append([episode.task, step, sorted(ours ^ reference)])
    return {"compared": compared, "different": different[:5], "seen": sorted(recorded)}


def imagined(world, upstream, count=6000):
    """Infos with random contacts, poses and lamps: both oracles on all of them."""
    rng = np.random.default_rng(1)
    template = world.info()
    compared, different, recorded = 0, [], {}
    for _ in range(count):
        start, end = (_imagine(template, rng) for _ in range(2))
        if rng.random() < 0.5:  # the same place and surface, so that small changes count
            for name, block in end["scene_info"]["movable_objects"].items():
                before = start["scene_info"]["movable_objects"][name]
                shift = rng.choice([0.0, 0.04, 0.06, 0.12, -0.12], 3)
                block["current_pos"] = tuple(np.add(before["current_pos"], shift))
        ours, reference = achieved(start, end), upstream.get_task_info(start, end)
        compared += 1
        for task in reference:
            recorded[task] = recorded.get(task, 0) + 1
        if ours != reference:
            different.append(sorted(ours ^ reference))
    return {"compared": compared, "different": different[:5], "seen": recorded}


def _imagine(template, rng):
    robot = template["robot_info"]["uid"]
    table = template["scene_info"]["fixed_objects"]["table"]
    blocks = template["scene_info"]["movable_objects"]
    uids = [block["uid"] for block in blocks.values()]
    touchable = [(robot, 9), (table["uid"], -1)]
    touchable += [(table["uid"], table["links"][k]) for k in ("plank_link", "drawer_link")]
    touchable += [(uid, -1) for uid in uids]

    def contacts(without):
        subset = [touchable[i] for i in rng.permutation(len(touchable))[: rng.integers(0, 3)]]
        return [(0, 0, body, 0, link) for body, link in subset if body != without]

    def block(uid):
        half = rng.uniform(-np.pi, np.pi) / 2
        tilt = rng.normal(0, 0.1, 2) * (rng.random() < 0.5)
        orn = np.array([tilt[0], tilt[1], np.sin(half), np.cos(half)])
        return {
            "uid": uid,
            "current_pos": tuple(rng.uniform(-0.1, 0.1, 3)),
            "current_orn": tuple(orn / np.linalg.norm(orn)),
            "current_lin_vel": tuple(rng.normal(0, 0.5, 3)),
            "current_ang_vel": tuple(rng.normal(0, 0.5, 3)),
            "contacts": contacts(uid),
        }

    held = contacts(robot)[:1]
    doors = {n: {"current_state": rng.uniform(0, 0.3)} for n in ("base__slide", "base__drawer")}
    lamps = {name: {"logical_state": int(rng.integers(2))} for name in ("lightbulb", "led")}
    return {
        "robot_info": {"uid": robot, "contacts": held},
        "scene_info": {
            "fixed_objects": {"table": table},
            "movable_objects": {name: block(b["uid"]) for name, b in blocks.items()},
            "doors": doors,
            "lights": lamps,
        },
    }


def main():
    root, table = sys.argv[1:3]
    world = simulator.Simulator(simulator.Settings(root, "tiny"))
    from calvin_env.envs.tasks import Tasks  # type: ignore[import-not-found]
    from omegaconf import OmegaConf  # type: ignore[import-not-found]

    upstream = Tasks(OmegaConf.load(table).tasks)
    report = {
        "states": states(world),
        "repeated": repeated(world),
        "played": played(world, upstream),
        "imagined": imagined(world, upstream),
    }
    world.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
