"""Fit FAST action tokens to the datasets of a config, or say how well a tokenizer fits them.

    python launch/fit_fast.py --config=configs/quickstart.py --out=models/fast_mine
    python launch/fit_fast.py --config=configs/quickstart.py --tokenizer=models/fast

Chunks are taken as training takes them: normalized by `data.normalization`, the gripper at -1 and
1, the last action repeated behind the end of an episode. Prints how many tokens a chunk takes, how
far a decoded action lies from the recorded one, and what share of the chunks is lost because their
range was not among those the tokenizer was fitted on. OUT is a folder that the published code
reads, too.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from jaxtyping import Float
from ml_collections import config_flags

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import cli, refusal
from vla_jax.commands import program
from vla_jax.data.mixture import Mixture, open_datasets
from vla_jax.data.robot import resolve_with_data
from vla_jax.data.sampler import chunks
from vla_jax.data.units.fast import FastTokenizer

CONFIG = config_flags.DEFINE_config_file("config")
OUT = flags.DEFINE_string("out", None, "New folder of the tokenizer that is fitted.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of one to try instead of fitting.")
VOCAB = flags.DEFINE_integer("vocab", 1024, "Tokens at most.")
SCALE = flags.DEFINE_float("scale", 10.0, "Finer with larger numbers, and longer.")
CHUNKS = flags.DEFINE_integer("chunks", 20_000, "Chunks that are drawn.")
DEBUG = flags.DEFINE_boolean("debug", False, refusal.HELP)
LONGEST = flags.DEFINE_integer("longest", 10_000, "Characters of a token at most.")


def draw_chunks(
    mixture: Mixture, count: int, seed: int, gripper: bool = True
) -> Float[np.ndarray, "n t a"]:
    """Chunks from all datasets, by their weights in training.

    Args:
        mixture: opened datasets.
        count: how many.
        seed: of the draw.
        gripper: whether the last number is a gripper, 0 = closed to 1 = open.

    Returns:
        In model units, the gripper at 1 = open and -1 = closed.
    """
    # The seed makes the tokenizer the same at every fit.
    rng = np.random.default_rng(seed)
    # Training draws a dataset by its weight times its windows.
    shares = np.multiply(mixture.weights, mixture.sizes)
    counts = rng.multinomial(count, shares / shares.sum())
    drawn = []
    for dataset, windows, number in zip(mixture.datasets, mixture.windows, counts, strict=True):
        place = windows.locate(rng.integers(0, len(windows), number))
        lengths = dataset.lengths[place.trajectory]
        frames, _ = chunks(place.end, lengths, 1, mixture.chunk)
        drawn.append(dataset.numbers(place.trajectory, frames, place.end[:, None])[0][:, 0])
    actions = np.concatenate(drawn).astype(np.float64)
    if gripper:  # all other numbers are in -1 .. 1
        actions[..., -1] = 2 * actions[..., -1] - 1
    return actions


def report(tokenizer: FastTokenizer, actions: Float[np.ndarray, "n t a"]) -> str:
    """How a tokenizer does on chunks."""
    # Chunks that a tokenizer cannot write would spoil the mean error; they count as lost.
    is_encodable = np.array([tokenizer.keeps(chunk) for chunk in actions])
    lines = [f"{tokenizer.size} tokens, scale {tokenizer.scale:g}, chunks {actions.shape[1:]}"]
    if is_encodable.any():
        ids = [tokenizer.encode(chunk) for chunk in actions[is_encodable]]
        counts, shape = np.array([len(row) for row in ids]), actions.shape[1:]
        decoded = np.stack([tokenizer.decode(row, *shape) for row in ids])
        errors = np.abs(decoded - actions[is_encodable])
        lines += [
            f"tokens a chunk: {counts.mean():.1f} in the mean, {np.quantile(counts, 0.99):.0f} at "
            f"99 %, {counts.max()} at most, of {np.prod(shape)} numbers",
            f"error of a decoded action: {errors.mean():.4f} in the mean, {errors.max():.4f} at "
            "most, in units of the normalized range [-1, 1]",
        ]
    lines.append(f"lost: {1 - is_encodable.mean():.2%} of {len(actions)} chunks")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Draw chunks, fit unless a tokenizer is given, print, write."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    if bool(OUT.value) == bool(TOKENIZER.value):
        sys.exit(f"{program()}: give --out, to fit, or --tokenizer, to try one")
    if OUT.value and Path(OUT.value).exists():
        sys.exit(f"{program()}: {OUT.value} exists")
    try:
        # Before the data, whose index may take long.
        folder = TOKENIZER.value
        with refusal.naming("--tokenizer"):
            tokenizer = FastTokenizer.from_dir(folder) if folder else None
        config = resolve_with_data(cli.required(CONFIG.value))
        model = config.model
        mixture = open_datasets(config.data, model.structure, model.action_dim, "train")
        # Another project's units scale a gripper like the rest.
        is_binary = model.has_gripper and not config.data.units
        actions = draw_chunks(mixture, CHUNKS.value, config.seed, is_binary)
        if tokenizer is None:
            tokenizer = FastTokenizer.fit(actions, VOCAB.value, SCALE.value, LONGEST.value)
        print(report(tokenizer, actions))
        if OUT.value:
            tokenizer.save(OUT.value)
            print(f"wrote {OUT.value}")
    except refusal.CAUSED as error:
        sys.exit(refusal.tell(error, DEBUG.value))


if __name__ == "__main__":
    cli.run_with_flags(main)
