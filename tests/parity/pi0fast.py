"""Parity of pi0-FAST: openpi's JAX model."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import arrays
from tests.parity import golden, names, original, pi0
from tests.parity.table import Row, compare, relative
from vla_jax.config import FastConfig, FastParity, ModelConfig, StructureParity
from vla_jax.convert.openpi import names as openpi
from vla_jax.convert.openpi.source import Unstacked
from vla_jax.data.language.fast_text import FastText
from vla_jax.data.units.fast import FastTokenizer
from vla_jax.models import vla, weights
from vla_jax.models.structures import splicing
from vla_jax.rules import flatten
from vla_jax.types import Actions, Observation

TOLERANCE = 1e-4
CAMERAS = ("primary", "secondary", "wrist")
EOS = 1
# The folder has no action tokenizer, of which the model itself needs no more than the end.
TOKENIZERS = Path(__file__).parents[1] / "fixtures/openpi_tokenizer"


def model_config(config: Mapping[str, Any], prompt: int, temperature: float = 0.0) -> ModelConfig:
    """A folder's model in our terms.

    Args:
        config: of the folder.
        prompt: columns of the prompt; the rest of the folder's are the answer's.
        temperature: of the choice of tokens.
    """
    base = original.model_config({}, "paligemma", pi0.arch(config))
    raw = golden.config(TOKENIZERS)["fast"]
    raw |= {"tokenizer": (TOKENIZERS / "fast_tokenizer.json").read_text(encoding="utf-8")}
    code = FastText(FastTokenizer.from_json(raw), config["vocab_size"] - 128, (5,), (6,), EOS)
    return dataclasses.replace(
        base,
        action_dim=config["action_dim"],
        structure=dataclasses.replace(
            base.structure,
            kind="discrete",
            chunk=config["action_horizon"],
            cameras=CAMERAS[: len(config["cameras"])],
            text_len=prompt,
            parity=StructureParity(),
        ),
        head=original.head_config("fast", gripper="number"),
        fast=FastConfig(
            length=config["max_decoding_steps"],
            prompt="pi0",
            temperature=temperature,
            token_end=config["vocab_size"] - 128,
            code=code.to_json(),
            parity=FastParity("all", skipped_position=True),
        ),
    )


def run(folder: Path) -> Iterator[Row]:
    """Names, training and decoding."""
    io, config = golden.arrays(folder), golden.config(folder)
    columns = io["obs/tokenized_prompt"].shape[1]
    model = vla.build(model_config(config, columns))
    source = Unstacked(arrays.Arrays(golden.weights(folder)))
    rows = openpi.jax_rows(model.config, model.arch)
    params = pi0.load(rows, model, source)
    yield names.exported(
        rows, flatten(params), {name: source.read(name) for name in source.shapes}, ()
    )
    if (folder / "full_param_names.txt").is_file():
        yield from full(folder)
    yield from training(model, params, io)
    yield from gradients(folder, rows, model, params, io)
    yield from decoding(config, params, io)


def full(folder: Path) -> Iterator[Row]:
    """The full-size names and shapes: each read once, and the same set written."""
    lines = [x.split("\t") for x in (folder / "full_param_names.txt").read_text().splitlines()]
    complete = {line[0]: tuple(json.loads(line[1])) for line in lines}
    reference = Unstacked(pi0.Shapes(complete)).shapes
    small = model_config(golden.config(folder), 8)
    backbone = dataclasses.replace(small.backbone, arch=pi0.FULL)
    model = vla.build(dataclasses.replace(small, backbone=backbone))
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    ours = {path: leaf.shape for path, leaf in flatten(tree).items()}
    rows = openpi.jax_rows(model.config, model.arch)
    report = weights.check(rows, ours, reference, ())
    problems = sum(map(len, (report.missing, report.unexpected, report.misshaped)))
    yield compare(f"{len(reference)} full-size names read once", problems, 0, 0)
    written = {name for row in rows for name in row.expand(ours[row.targets[0]][0])}
    yield compare("the same full-size names written", len(written ^ set(reference)), 0, 0)


def observation(
    io: Mapping[str, np.ndarray], side: int, text: tuple[np.ndarray, np.ndarray]
) -> Observation:
    """`obs/*` with the real columns of a prompt."""
    reference = [name for name in io if name.startswith("obs/image/")]
    pixels = [io[name].astype(np.float32) / 255.0 * 2.0 - 1.0 for name in reference]
    if pixels[0].shape[1] != side:
        pixels = [pi0._resized(image, side) for image in pixels]
    images = {c: jnp.asarray(p)[:, None] for c, p in zip(CAMERAS, pixels, strict=False)}
    ids, mask = text
    observed = jnp.ones((len(ids), 1), bool)
    return Observation(images, dict.fromkeys(images, observed), jnp.asarray(ids), jnp.asarray(mask))


def prompts(io: Mapping[str, np.ndarray], at: str) -> tuple[np.ndarray, np.ndarray]:
    """The prompt without the answer, and its mask."""
    ids, mask = io[f"{at}/tokenized_prompt"], io[f"{at}/tokenized_prompt_mask"].astype(bool)
    mask = mask & (io[f"{at}/token_ar_mask"] == 0)
    return np.where(mask, ids, 0).astype(np.int32), mask


def answers(io: Mapping[str, np.ndarray]) -> Any:
    """The answers, which begin behind the prompt of every row."""
    ids, is_answer = io["obs/tokenized_prompt"], io["obs/token_loss_mask"]
    written = np.full((len(ids), is_answer.sum(1).max()), -1, np.int32)
    for row, inputs, wanted in zip(written, ids, is_answer, strict=True):
        row[: wanted.sum()] = inputs[wanted]
    chunk = jnp.zeros((len(ids), 1, 1, 1))
    return Actions(chunk, jnp.ones(chunk.shape[:-1], bool), jnp.asarray(written))


def training(model: Any, params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Tokens, masks, positions, hidden states, scores and the loss."""
    observed, actions = observation(io, model.image.size, prompts(io, "obs")), answers(io)

    def look(m: Any) -> Any:
        tokens, _ = m.spliced(observed, jnp.maximum(actions.written, 0))
        return tokens, m.backbone(tokens), m.scores(observed, actions.written)

    run: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))
    tokens, hidden, scores = run(params)
    valid, wanted = np.asarray(tokens.valid), io["inputs/mask"]
    count = min(valid.shape[1], wanted.shape[1])
    # Behind an answer ours has columns of padding that nothing sees, theirs are masked.
    real = wanted[:, :count]
    width = tokens.embeds.shape[-1]
    embeds = np.asarray(tokens.embeds)[:, :count] * width**0.5
    yield compare("tokens", embeds[real], io["inputs/embeds"][:, :count][real], TOLERANCE)
    yield compare("tokens that are not there", (~valid[:, :count][real]).sum(), 0, 0)
    array = np.asarray(tokens.given)[:, :count]
    yield compare("prefix", array[real], (io["inputs/ar_mask"][:, :count] == 0)[real], 0)
    together = array[:, :, None] & array[:, None, :]
    sees = (np.tril(np.ones((count, count), bool)) | together) & valid[:, None, :count]
    both = real[:, :, None] & real[:, None, :]
    reference = io["attn_mask"][:, :count, :count]
    yield compare("who sees whom", sees[both], reference[both], 0)
    ours = (np.cumsum(valid, 1) - 1)[:, :count]
    yield compare("positions", ours[real], np.broadcast_to(np.arange(count), real.shape)[real], 0)
    inner = real[:, : io["pre_logits"].shape[1]]
    ours = np.asarray(hidden)[:, : inner.shape[1]]
    yield compare(
        "hidden states", ours[inner[:, : ours.shape[1]]],
        io["pre_logits"][:, : ours.shape[1]][inner[:, : ours.shape[1]]], TOLERANCE,
    )  # fmt: skip
    yield from _scores(io, np.asarray(scores), np.asarray(actions.written))
    _, parts = jax.jit(lambda p: losses(model, p, observed, actions))(params)
    yield compare("loss", parts["rows"], io["loss"], TOLERANCE)


def _scores(io: Mapping[str, np.ndarray], ours: np.ndarray, written: np.ndarray) -> Iterator[Row]:
    """Scores of the words of every answer; behind them the folder has those of padding."""
    for i, (row, reference) in enumerate(zip(ours, io["logits_post"], strict=True)):
        count = (written[i] >= 0).sum()
        yield compare(f"scores {i}", row[:count], reference[:count], TOLERANCE)


def losses(model: Any, params: Any, seen: Observation, actions: Any) -> Any:
    """The mean loss and its parts."""
    return model.apply({"params": params}, seen, actions, None, 0.0, method="loss")


def gradients(
    folder: Path,
    rows: list[weights.Weight],
    model: Any,
    params: Any,
    io: Mapping[str, np.ndarray],
) -> Iterator[Row]:
    """Of the mean loss: whole tensors that the folder holds, and the norm of every one's."""
    observed, actions = observation(io, model.image.size, prompts(io, "obs")), answers(io)
    grads = flatten(jax.jit(jax.grad(lambda p: losses(model, p, observed, actions)[0]))(params))
    named = arrays.restacked(rows, {k: np.asarray(v) for k, v in grads.items()})
    for key in sorted(io):
        if key.startswith("grad/"):
            error = relative(named[key[5:]], io[key])
            yield Row(f"{key}, relative", error, pi0.GRADIENT_TOLERANCE, 1.0)
    norms = golden.config(folder, "grads.json")["norm"]
    yield pi0._norms("gradient norms", norms, rows, grads)


def decoding(config: Mapping[str, Any], params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Positions and scores of the prompt, and what is written, greedily and by chance."""
    columns = io["infer/tokenized_prompt"].shape[1]
    model = vla.build(model_config(config, columns))
    observed = observation(io, model.image.size, prompts(io, "infer"))

    def prefill(m: Any) -> Any:
        tokens, first = m.spliced(observed, jnp.zeros((len(observed.text), 0), jnp.int32))
        hidden = splicing.take(m.backbone(tokens), first - 1)
        return tokens.valid, m.backbone.logits(hidden)[:, 0]

    valid, scores = jax.jit(lambda p: model.apply({"params": p}, method=prefill))(params)
    yield compare("scores of the prompt", scores, io["infer/prefill_last_logits"], TOLERANCE)
    valid, reference = np.asarray(valid), io["infer/aligned_mask"]
    yield compare("tokens of the prompt", valid.sum(1), reference.sum(1), 0)
    # Theirs stand at the right end.
    ours = np.cumsum(valid, 1) - 1
    same = all(
        np.array_equal(a[v], b[m])
        for a, v, b, m in zip(ours, valid, io["infer/positions"], reference, strict=True)
    )
    yield compare("positions of the prompt", not same, False, 0)
    for name in (name for name in io if name.startswith("infer/tokens")):
        chance = name.removeprefix("infer/tokens")
        heat, key = (float(chance[5:8]), int(chance.split("key")[1])) if chance else (0.0, 0)
        writer = vla.build(model_config(config, columns, heat))
        result = jax.jit(
            lambda p, m=writer, k=key: m.apply(
                {"params": p}, observed, jax.random.key(k), method="write"
            )
        )(params)
        yield compare(f"{name[6:]} written", result, io[name], 0)
