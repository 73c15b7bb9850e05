"""Parity cases of the heads alone and of the action tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import arrays
from tests.parity import golden, original
from tests.parity.robo import GRADIENT_TOLERANCE, HEAD_TOLERANCE, TOLERANCE, theirs
from tests.parity.table import Row, compare
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import HeadSizes, pool_tokens
from vla_jax.models.losses import action_loss, token_loss
from vla_jax.rules import flatten, unflatten
from vla_jax.types import Actions


def continuous(folder: Path) -> Iterator[Row]:
    """One head: outputs, losses with and without mask, gradients, streaming."""
    io, meta = golden.arrays(folder), golden.config(folder, "meta.json")
    attrs, params = meta["attrs"], golden.weights(folder)
    layers = {k.rsplit("_l", 1)[1] for k in params if k.startswith("rnn.weight_ih")}
    layers = layers or {k.split(".")[2] for k in params if k.startswith("gpt.h.")}
    config = original.head_config(
        robovlms.HEADS[meta["cls"]][0],
        hidden=attrs["hidden_size"],
        down_sample=attrs["down_sample"],
        layers=max(1, len(layers)),
    )
    head_sizes = _sizes(attrs)
    head = HEADS[config.kind](config, head_sizes)
    x = io["input"]
    x = jnp.asarray(x[:, None] if x.ndim == 3 else x)

    def features(x: Any) -> Any:
        if config.down_sample == "pooling":
            return pool_tokens(x, jnp.ones(x.shape[:3], bool), head_sizes.latents)
        return x

    def run(tree: Any, x: Any, valid: Any) -> Any:
        return head.apply({"params": tree}, features(x), valid)

    observed = jnp.ones(x.shape[:2], bool)
    abstract = jax.eval_shape(lambda: head.init(jax.random.key(0), features(x), observed))["params"]
    rows = head.weight_map(config, x.shape[-1])
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    flat = arrays.to_ours(rows, shapes, params)
    tree = unflatten({path: jnp.asarray(x) for path, x in flat.items()})

    chunk = np.concatenate([io["label_arm"], io["label_gripper"][..., None]], axis=-1)
    chunk, mask = (y[:, None] if io["input"].ndim == 3 else y for y in (chunk, io["mask"]))

    def loss(tree: Any, mask: Any) -> Any:
        prediction = run(tree, x, observed)
        total, parts = action_loss(prediction, Actions(jnp.asarray(chunk), mask), 0.01)
        return total, (prediction, parts)

    for name, chosen in (("nomask", np.ones_like(mask)), ("mask", mask)):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (prediction, parts)), grads = step(tree, jnp.asarray(chosen))
        if name == "nomask":
            arm, gripper = io["arm"], io["gripper"][..., 0]
            got = prediction.gripper.reshape(gripper.shape)
            yield compare("arm", prediction.arm.reshape(arm.shape), arm, HEAD_TOLERANCE)
            yield compare("gripper", got, gripper, HEAD_TOLERANCE)
        for part in ("loss_arm", "loss_gripper", "acc_gripper"):
            expected = io[f"loss_{name}.{part}"]
            yield compare(f"{part}, {name}", parts[part], expected, HEAD_TOLERANCE)
        yield compare(f"loss, {name}", total, io[f"loss_{name}.total_0.01"], HEAD_TOLERANCE)
    yield from _gradients(rows, grads, io)
    if "step_inputs" in io:
        yield from _streaming(lambda x, valid: run(tree, x, valid), head_sizes.steps, io)


def _gradients(rows: Any, grads: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Of the masked loss."""
    named = theirs(rows, grads)
    for key in io:
        if key.startswith("grad/"):
            yield compare(key, named[key[5:]], io[key], GRADIENT_TOLERANCE)
    norms = {key[9:]: float(io[key]) for key in io if key.startswith("gradnorm/")}
    got = [np.linalg.norm(named[name]) for name in norms]
    yield compare(f"{len(norms)} gradient norms", got, list(norms.values()), TOLERANCE)


def _streaming(run: Any, window: int, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """One step after another, the last ones past the window."""
    inputs, arms, grippers = io["step_inputs"], [], []
    past = np.zeros((1, window, *inputs.shape[3:]), np.float32)
    valid = np.zeros((1, window), bool)
    run = jax.jit(run)
    for x in inputs:
        past = np.concatenate([past[:, 1:], x], axis=1)
        valid = np.concatenate([valid[:, 1:], [[True]]], axis=1)
        prediction = run(jnp.asarray(past), jnp.asarray(valid))
        arms.append(prediction.arm[:, -1:])
        grippers.append(prediction.gripper[:, -1:, ..., None])
    yield compare("streaming arm", np.stack(arms), io["step_arm"], HEAD_TOLERANCE)
    yield compare("streaming gripper", np.stack(grippers), io["step_gripper"], HEAD_TOLERANCE)


def _sizes(attrs: Mapping[str, Any]) -> HeadSizes:
    return HeadSizes(
        steps=attrs.get("window_size", 1),
        latents=attrs["latent"],
        chunk=attrs["fwd_pred_next_n"],
        action_dim=attrs["action_dim"],
    )


def discrete(folder: Path) -> Iterator[Row]:
    """Loss, metrics and gradient of token scores."""
    io = golden.arrays(folder)
    logits, labels = jnp.asarray(io["logits"]), jnp.asarray(io["labels"])
    tokenizer = ActionTokenizer(original.TOKEN_END)

    def loss(logits: Any) -> Any:
        return token_loss(logits[:, :-1], labels[:, 1:], tokenizer, 7)

    (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(logits)
    yield compare("loss", total, io["loss.loss_arm"], HEAD_TOLERANCE)
    for name in ("loss_arm", "action_l1", "acc_arm", "acc_gripper"):
        yield compare(name, metrics[name], io[f"loss.{name}"], HEAD_TOLERANCE)
    largest, norm = jnp.abs(grads).max(), jnp.linalg.norm(grads)
    yield compare("largest gradient", largest, io["grad_logits_absmax"], GRADIENT_TOLERANCE)
    yield compare("gradient norm", norm, io["grad_logits_norm"], GRADIENT_TOLERANCE)


def tokenizer(folder: Path) -> Iterator[Row]:
    """Ids of values and values of ids, in numpy and on the device, exact."""
    with np.load(folder / "tables.npz") as z:
        io = {k: z[k] for k in z.files}
    for prefix in sorted({k.split("/")[0] for k in io} - {"batch"}):
        table = {k.split("/")[1]: v for k, v in io.items() if k.startswith(prefix + "/")}
        end, begin, _, specials, vocabulary = table["scalars"].tolist()
        bins = table["bins"]
        ours = ActionTokenizer(vocabulary - specials - 10, len(bins), bins[0], bins[-1])
        yield compare(f"{prefix} ends", [ours.end, ours.end - ours.bins - 1], [end, begin], 0.0)
        yield compare(f"{prefix} edges", ours.edges, bins, 0.0)
        yield from _both_ways(prefix, ours, table["grid"], table["enc"])
        yield compare(f"{prefix} values", ours.decode(table["dec_ids"]), table["dec"], 0.0)
        values = ours.decode(jnp.asarray(table["dec_ids"]))
        expected = table["dec"].astype(np.float32)
        yield compare(f"{prefix} values on the device", values, expected, 0.0)
        actions = ours.is_action(table["dec_ids"])
        wanted = (table["dec_ids"] > begin) & (table["dec_ids"] < end)
        yield compare(f"{prefix} which are actions", actions, wanted, 0.0)
    ours = ActionTokenizer(original.TOKEN_END)
    yield from _both_ways("batch", ours, io["batch/actions"], io["batch/ids"])
    yield compare("batch values", ours.decode(io["batch/ids"]), io["batch/dec"], 0.0)


def _both_ways(
    prefix: str, ours: ActionTokenizer, values: np.ndarray, ids: np.ndarray
) -> Iterator[Row]:
    yield compare(f"{prefix} ids", ours.encode(values), ids, 0.0)
    # float32 moves values that sit on an edge, so the device answers for the rounded ones.
    rounded = values.astype(np.float32)
    got, expected = ours.encode(jnp.asarray(rounded)), ours.encode(rounded.astype(np.float64))
    yield compare(f"{prefix} ids on the device", got, expected, 0.0)
