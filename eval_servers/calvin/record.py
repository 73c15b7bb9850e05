"""Record demonstrations of the scripted expert in CALVIN's own layout (one .npz a frame).

    python eval_servers/calvin/record.py --out=DIR --episodes=200 --renderer=egl

DIR/training and DIR/validation then read as CALVIN's do: frames with absolute and relative actions,
language annotations, and the merged configuration, so that `rollout.py --dataset=DIR/validation`
builds the very world of the data. Blocks and arm start near, not at, initial states from the second
half of the evaluation's list; those of the first half are never demonstrated.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers.calvin import chains, oracle, simulator
from eval_servers.calvin.expert import STEP, TASKS, Expert
from eval_servers.calvin.initial import BLOCKS, State, initial_state
from eval_servers.calvin.probe import add_flags, settings_of
from eval_servers.calvin.simulator import Simulator, SimulatorError
from eval_servers.progress import Progress

MAX_STEPS = 120
VAL_EVERY = 25  # one demonstration in so many is for validation
_ARM_NOISE = 0.02  # rad, of the joints at the start
_BLOCK_NOISE = 0.03  # meters, of blocks on the table
_TURN = 0.05  # rad of a full action

Frame = Dict[str, Any]  # name -> array


def demonstrate(
    world: Simulator, task: str, state: State, rng: np.random.RandomState, noise: float
) -> Optional[List[Frame]]:
    """One demonstration.

    Args:
        world: to act in.
        task: one of `expert.TASKS`.
        state: to start near of.
        rng: of the start and of the noise.
        noise: standard deviation added to the executed motion, in action units; what is recorded
            is the action without it.

    Returns:
        The frames, the last one (the task is solved) with no motion, or None if the expert failed.
    """
    robot, scene = initial_state(state)
    # Fields 7 to 13 are the joints; the tool's pose in fields 0 to 5 follows from them.
    robot[7:14] += rng.normal(0, _ARM_NOISE, 7)
    for name, fields in BLOCKS.items():
        # A block in the slider has no room to be moved sideways.
        if state.places[name] == "table":
            scene[fields][:2] += rng.uniform(-_BLOCK_NOISE, _BLOCK_NOISE, 2)
        scene[fields][5] += rng.uniform(-0.1, 0.1)
    obs = world.reset(robot, scene)
    start, script, frames = world.info(), Expert(task), []
    for _ in range(MAX_STEPS):
        action = script.act(obs["robot_obs"], obs["scene_obs"])
        frames.append(_frame(obs, action))
        executed = action.copy()
        executed[:3] = np.clip(executed[:3] + rng.normal(0, noise, 3), -1, 1)
        # The script tracks the simulator's own target, which the noise has moved too.
        script.disturbed((executed - action)[:3] * STEP)
        obs, info = world.step(executed)
        if oracle.solved(task, start, info):
            return frames + [_frame(obs, np.append(np.zeros(6), action[6]))]
    return None


def _frame(obs: Dict[str, Any], action: np.ndarray) -> Frame:
    robot = np.asarray(obs["robot_obs"], np.float64)
    reach = np.concatenate([action[:3] * STEP, action[3:6] * _TURN])
    return {
        "actions": np.append(robot[:6] + reach, action[6]),
        "rel_actions": action.astype(np.float64),
        "robot_obs": robot,
        "scene_obs": np.asarray(obs["scene_obs"], np.float64),
        "rgb_static": np.ascontiguousarray(obs["rgb_obs"]["rgb_static"], np.uint8),
        "rgb_gripper": np.ascontiguousarray(obs["rgb_obs"]["rgb_gripper"], np.uint8),
    }


class Split:
    """One folder of frames, `training` or `validation`; its indices are written by `close`."""

    def __init__(self, folder: str, scene: str) -> None:
        """Nothing is made before the first demonstration."""
        self._folder, self._scene = folder, scene
        self._spans: List[Tuple[int, int]] = []  # first and last frame
        self._tasks: List[str] = []
        self._texts: List[str] = []
        self._next = 0

    def write(self, frames: List[Frame], task: str, text: str) -> None:
        """Append one demonstration."""
        os.makedirs(self._folder, exist_ok=True)
        first = self._next
        for frame in frames:
            path = os.path.join(self._folder, "episode_{:07d}.npz".format(self._next))
            np.savez_compressed(path, **frame)
            self._next += 1
        self._spans.append((first, self._next - 1))
        self._tasks.append(task)
        self._texts.append(text)

    def close(self, config: Any) -> None:
        """Write which frames belong together, the annotations, and the world's configuration."""
        from omegaconf import OmegaConf  # type: ignore[import-not-found]

        if not self._spans:
            return

        def save(name: str, value: Any) -> None:
            path = os.path.join(self._folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            np.save(path, value, allow_pickle=True)

        save("ep_start_end_ids.npy", np.array(self._spans, np.int64))
        save("ep_lens.npy", np.array([b - a + 1 for a, b in self._spans], np.int64))
        save("scene_info.npy", {"calvin_scene_" + self._scene: [0, self._next - 1]})
        # CALVIN's annotations end before the frame they name: here the one without a motion.
        language = {"ann": self._texts, "task": self._tasks}
        save(
            os.path.join("lang_annotations", "auto_lang_ann.npy"),
            {"language": language, "info": {"episodes": [], "indx": self._spans}},
        )
        hydra = os.path.join(self._folder, ".hydra")
        os.makedirs(hydra)
        OmegaConf.save(config, os.path.join(hydra, "merged_config.yaml"))


def record(
    settings: simulator.Settings, out: str, episodes: int, seed: int, noise: float
) -> Dict[str, int]:
    """Write demonstrations, the tasks in turn; returns how many there are, and of how many frames.

    Raises:
        SimulatorError: the simulator cannot be built, or the expert keeps failing in it.
        FileExistsError: `out` exists.
    """
    work = os.path.abspath(out) + ".partial"
    for path in (out, work):
        if os.path.exists(path):
            raise FileExistsError("{} exists: name a new folder, or remove it".format(path))
    world = Simulator(settings)
    protocol = chains.load()
    demonstrated = protocol.states[len(protocol.states) // 2 :]
    splits = {
        name: Split(os.path.join(work, name), settings.scene) for name in ("training", "validation")
    }
    counts = {"training": 0, "validation": 0, "frames": 0, "failed": 0}
    rng = np.random.RandomState(seed)
    with Progress(episodes) as progress:
        for number in range(episodes):
            task = TASKS[number % len(TASKS)]
            starts = [state for state in demonstrated if chains.possible(task, state)]
            state = starts[rng.randint(len(starts))]
            frames = demonstrate(world, task, state, rng, noise)
            progress.add(frames is not None)
            if frames is None:
                counts["failed"] += 1
                # The 5 lets a short run survive an unlucky beginning.
                if counts["failed"] > 5 + number // 2:
                    raise SimulatorError("the expert fails at most of its tasks in this world")
                continue
            name = "validation" if number % VAL_EVERY == VAL_EVERY - 1 else "training"
            splits[name].write(frames, task, protocol.instructions[task])
            counts[name] += 1
            counts["frames"] += len(frames)
    config = simulator.load_config(settings)
    config.data_path = "data"  # relative to calvin_env, wherever that is
    for split in splits.values():
        split.close(config)
    # The rename comes last, so that a folder of this name is always complete.
    os.replace(work, out)
    world.close()
    return counts


def main(arguments: Sequence[str]) -> int:
    """Parse flags and record; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--episodes", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--noise", type=float, default=0.2, help="of the executed motion, in action units"
    )
    add_flags(parser)
    flags = parser.parse_args(arguments)
    try:
        counts = record(settings_of(flags), flags.out, flags.episodes, flags.seed, flags.noise)
    except (SimulatorError, OSError) as error:
        print("record: {}".format(error), file=sys.stderr)
        return 1
    print(
        "{}: {training} training and {validation} validation demonstrations, {frames} frames,"
        " {failed} failed".format(flags.out, **counts)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
