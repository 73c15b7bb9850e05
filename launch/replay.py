"""Does a policy know its own data? Recorded observations in, predicted beside recorded actions out.

    python launch/replay.py --checkpoint=runs/my_robot --out=runs/replay
    python launch/replay.py --checkpoint=runs/kosmos --dataset=bridge_dataset --split=val

Feeds episodes of the data the policy was trained on to the policy, frame after frame as a robot
would, and compares the action it answers with the one that was recorded, in the robot's units.
Prints the mean absolute error of every dimension beside the error of always answering the mean
action, and draws both courses. If a policy fails on the robot and not here, the fault is on the
robot's side: cameras, units, timing. See docs/troubleshooting.md.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import refusal
from vla_jax.commands import HelpFormatter
from vla_jax.shipped import install_hint


@dataclass(frozen=True)
class Episode:
    """One replayed episode.

    Attributes:
        number: of the trajectory within the split that was read.
        instruction: what the policy was told.
        recorded: float [n, a], actions in the robot's units, the gripper as its command.
        predicted: float [n, a], the first action of each answer.
    """

    number: int
    instruction: str
    recorded: np.ndarray
    predicted: np.ndarray


def replay(policy: Any, dataset: Any, keys: dict[str, str], episodes: int) -> list[Episode]:
    """Runs the policy over episodes that are spread evenly over a dataset.

    Args:
        policy: a `Policy` that answers one action a step.
        dataset: a `Dataset` in the robot's units.
        keys: camera role -> observation key.
        episodes: how many at most.
    """
    from vla_jax import progress
    from vla_jax.inference.protocol import PROMPT_KEY, STATE_KEY

    # Evenly spread, because neighbors in a dataset are often alike.
    count = len(dataset.lengths)
    chosen = np.unique(np.linspace(0, count - 1, min(episodes, count)).round().astype(int)).tolist()
    gripper = policy.metadata["gripper"]
    replayed = []
    with progress.bar(total=int(dataset.lengths[chosen].sum()), unit="step") as bar:
        for number in chosen:
            rows = slice(*dataset.starts[number : number + 2])
            recorded = dataset.actions[rows].astype(np.float64)
            if gripper:
                span = gripper["open"] - gripper["closed"]
                # The data have 0 = closed and 1 = open; the policy replies the robot's own numbers.
                recorded[:, -1] = gripper["closed"] + recorded[:, -1] * span
            text = dataset.instructions[dataset.text[dataset.text_starts[number]]]
            # A new session, so that no history reaches into the next episode.
            session, predicted = policy.new_session(), []
            for frame in range(len(recorded)):
                obs: dict[str, Any] = {PROMPT_KEY: text}
                for role, key in keys.items():
                    height, width = dataset.image_sizes.get(role, (224, 224))
                    image = np.empty((1, height, width, 3), np.uint8)
                    dataset.images(role, number, np.array([frame]), image)
                    obs[key] = image[0]
                if policy.metadata["needs_proprio"]:
                    obs[STATE_KEY] = dataset.proprio[rows][frame]
                policy.check(obs)
                reply, session = policy.infer(session, obs)
                predicted.append(reply["actions"][0])
                bar.update()
            replayed.append(Episode(number, text, recorded, np.array(predicted, np.float64)))
    return replayed


def errors(replayed: list[Episode]) -> dict[str, Any]:
    """Mean absolute errors of every dimension: the policy's, and the mean action's."""
    # Of all steps alike, so that a short episode does not weigh as much as a long one.
    recorded = np.concatenate([episode.recorded for episode in replayed])
    predicted = np.concatenate([episode.predicted for episode in replayed])
    return {
        "episodes": len(replayed),
        "steps": len(recorded),
        "policy": np.abs(predicted - recorded).mean(0).tolist(),
        "mean_action": np.abs(recorded.mean(0) - recorded).mean(0).tolist(),
    }


def report(measured: dict[str, Any]) -> str:
    """The table that is printed, and what it means."""
    lines = [f"{'dimension':>10}{'policy':>12}{'mean action':>13}   policy / mean action"]
    ratios = []
    for i, (ours, base) in enumerate(zip(measured["policy"], measured["mean_action"], strict=True)):
        ratio = f"{ours / base:.2f}" if base > 0 else "the recording is constant"
        ratios += [ours / base] if base > 0 else []
        lines.append(f"{i:>10}{ours:>12.4g}{base:>13.4g}   {ratio}")
    # Of ratios, because dimensions have different units: meters, radians, an opening.
    mean = float(np.mean(ratios)) if ratios else 1.0
    verdict = (
        "it knows these data: look at the robot's side" if mean < 0.5
        else "it has learned something, not much" if mean < 0.9
        else "no better than the mean action: it has not learned these data"
    )  # fmt: skip
    where = f"{measured['episodes']} episodes, {measured['steps']} steps"
    return "\n".join([f"mean absolute error in the robot's units, {where}", *lines, verdict])


def plot(replayed: list[Episode], path: Path, has_gripper: bool) -> None:
    """Every dimension of up to three episodes, recorded and predicted.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = replayed[:3]
    dim = shown[0].recorded.shape[1]
    figure, axes = pyplot.subplots(
        dim, len(shown), figsize=(4 * len(shown) + 1, 1.2 * dim + 0.8), squeeze=False
    )
    for column, episode in enumerate(shown):
        axes[0, column].set_title(f"{episode.number}: {episode.instruction[:40]}", fontsize=8)
        for i in range(dim):
            axis = axes[i, column]
            axis.plot(episode.recorded[:, i], color="0.3", linewidth=1.2, label="recorded")
            axis.plot(episode.predicted[:, i], color="tab:red", linewidth=0.9, label="predicted")
            axis.tick_params(labelsize=6)
            if not column:
                is_gripper = has_gripper and i == dim - 1
                axis.set_ylabel("gripper" if is_gripper else f"dim {i}", fontsize=7)
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    # Written beside and renamed: no viewer sees half a picture.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)


def run(flags: argparse.Namespace) -> None:
    """Load the policy and its data, replay, print, write.

    Raises:
        ValueError, DataError, CheckpointError: what is wrong with flags, data or checkpoint.
    """
    from vla_jax.config import resolve
    from vla_jax.data.find_spec import find_spec, short_name
    from vla_jax.data.formats import find_reader
    from vla_jax.data.open_dataset import open_dataset
    from vla_jax.inference.execution import Execution
    from vla_jax.inference.policy import Policy
    from vla_jax.train import checkpoint, checkpoint_folder

    with refusal.naming("--checkpoint"):
        checkpoint_folder.locate(flags.checkpoint, read_only=True)
    if flags.data:
        with refusal.naming("--data"):
            find_reader(flags.data)
    # One action a step: what is executed of a chunk later does not depend on the observation.
    policy = Policy.from_checkpoint(
        flags.checkpoint, flags.step, flags.dataset, execution=Execution("first")
    )
    with checkpoint.Checkpoints(flags.checkpoint, read_only=True) as saved:
        # The stored config and no file, which may have changed since the training.
        config = resolve(saved.meta(flags.step)["config"])
    name = policy.metadata["dataset"]
    (entry,) = [e for e in config.data.datasets if short_name(e.spec) == name]
    if flags.data:
        entry = dataclasses.replace(entry, dir=flags.data)
    dataset = open_dataset(
        name,
        find_spec(entry.spec, config.data.parity.variant),
        entry.dir,
        flags.split,
        config.model.structure.cameras,
        config.model.action_dim,
        cache_dir=config.data.cache_dir,
    )
    # Compiled before the bar begins, whose speed would else include it.
    policy.warmup()
    replayed = replay(policy, dataset, policy.metadata["cameras"], flags.episodes)
    measured = errors(replayed)
    print(report(measured))
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "replay.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    try:
        plot(replayed, flags.out / "replay.png", policy.metadata["gripper"] is not None)
        print(f"wrote {flags.out / 'replay.png'}")
    except ImportError:
        print(f"no plot, which needs matplotlib: {install_hint('demo')}")


def main() -> None:
    """Parse flags and replay; a user's mistake is one line."""
    refusal.quiet_interrupt()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder that launch/train.py wrote")
    add("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    add("--dataset", metavar="KEY", help="which of the datasets it was trained on")
    add("--data", default="", metavar="DIR", help="where that dataset is now, if it was moved")
    add("--split", default="train", help="of the dataset's own splits (default: train)")
    add("--episodes", type=int, default=4, metavar="N", help="episodes at most (default: 4)")
    add("--out", type=Path, default=Path("runs/replay"), help="default: %(default)s")
    refusal.add_flag(parser)
    flags = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every phase of a restore
    try:
        refusal.check_devices()
        run(flags)
    except refusal.CAUSED as error:
        sys.exit(refusal.tell(error, flags.debug))


if __name__ == "__main__":
    main()
