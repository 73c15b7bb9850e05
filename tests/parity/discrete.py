"""Parity cases of RoboVLMs' discrete structure."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, original, robo
from tests.parity.table import Row, compare
from vla_jax.models import vla
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.losses import NO_LABEL, token_loss
from vla_jax.models.structures import splicing
from vla_jax.types import Actions

METRICS = ("loss_arm", "acc_arm", "acc_gripper", "action_l1")


def run(describe: robo.Describe, folder: Path) -> Iterator[Row]:
    """The detokenizer: the original's own ids, then our way from actions."""
    io, config = golden.arrays(folder), golden.config(folder)
    model, rows, params = robo.build(folder, config, describe)
    ids, labels, mask = (
        jnp.asarray(io[f"batch/instr_and_action_{name}"]) for name in ("ids", "labels", "mask")
    )
    images = original.cameras(io, "batch/rgb", "batch/hand_rgb")
    images = {name: images[name] for name in model.config.structure.cameras}
    b, w, s = ids.shape

    def forward(m: vla.VLA) -> Any:
        observation = original.observation(images, io["batch/text"], io["batch/text_mask"] == 1)
        tokens = m.encode(observation)
        n = tokens.shape[2]
        text = m.backbone.embed_text(ids.reshape(b * w, s).astype(jnp.int32))
        observed = jnp.ones((b * w, n), bool)
        inputs, _ = splicing.splice(
            text,
            mask.reshape(b * w, s).astype(bool),
            tokens.reshape(b * w, n, -1),
            observed,
            jnp.broadcast_to(jnp.arange(n), observed.shape),
            text[:, :0],
            m.layout,
            padded=True,
        )
        everything = jnp.broadcast_to(jnp.arange(n + s), (b * w, n + s))
        sequence = splicing.Sequence(inputs, everything, everything >= 0)
        sequence = splicing.join(sequence, jnp.ones((b, w), bool), padded=True)
        logits = m.backbone.logits(m.backbone(sequence.tokens))
        none = jnp.full((b, w, n), NO_LABEL)
        wanted = jnp.concatenate([labels[..., :1], none, labels[..., 1:]], axis=-1).reshape(b, -1)
        total, metrics = token_loss(logits[:, :-1], wanted[:, 1:], m.head.tokenizer, 7)
        return total, (metrics, sequence, logits)

    def loss(params: Any) -> Any:
        return model.apply({"params": params}, method=forward)

    (total, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    metrics, sequence, logits = aux
    valid = io["fwd/lm0_attention_mask"]
    yield compare("sequence", sequence.tokens.embeds, io["fwd/lm0_inputs_embeds"], robo.TOLERANCE)
    yield compare("attention mask", sequence.tokens.valid, valid, 0.0)
    if "fwd/lm0_logits" in io:
        yield compare("logits", logits, io["fwd/lm0_logits"], robo.TOLERANCE)
    yield compare("loss", total, io["loss/total"], robo.TOLERANCE)
    for name in METRICS:
        yield compare(name, metrics[name], io[f"pred/{name}_act"], robo.TOLERANCE)
    yield from robo.gradients(folder, rows, grads, io)
    if bool(mask.all()):
        yield from _from_actions(model, params, io, images)
    if "infer/action_0" in io:
        yield _written(model, params, io)


def recorded(ids: np.ndarray, tokenizer: ActionTokenizer) -> np.ndarray:
    """Actions [..., 7] that become these ids again, gripper from 0 to 1.

    What the original's batches record as `action_chunck` are other actions than those of their
    ids. An id stands for the middle of its bin, but for the last one: that bin holds the end of the
    range alone, and shares its middle with the bin below.
    """
    values = np.where(
        ids == tokenizer.end - tokenizer.bins, tokenizer.high, tokenizer.decode(ids)
    ).reshape(*ids.shape[:-1], -1, 7)
    span = tokenizer.high - tokenizer.low
    values[..., -1] = (values[..., -1] - tokenizer.low) / span  # 1 = open, 0 = closed
    return values


def _from_actions(
    model: vla.VLA, params: Any, io: Mapping[str, np.ndarray], images: Any
) -> Iterator[Row]:
    """The same loss from a prompt and actions, as training computes it."""
    ids, labels = (io[f"batch/instr_and_action_{name}"] for name in ("ids", "labels"))
    h: Any = model.config.head
    count = model.config.structure.chunk * 7
    prompt = ids.shape[-1] - count - 1
    text = np.concatenate([ids[:, 0, :prompt], ids[:, 0, -1:]], axis=-1)
    values = recorded(ids[..., prompt:-1], ActionTokenizer(h.token_end, h.bins, h.low, h.high))
    supervised = (labels[..., prompt:-1] != NO_LABEL).reshape(values.shape).all(-1)
    actions = Actions(jnp.asarray(values, jnp.float32), jnp.asarray(supervised))
    observation = original.observation(images, text, np.ones(text.shape, bool))
    args = (observation, actions, None, 0.0)
    run = jax.jit(lambda p: model.apply({"params": p}, *args, method="loss"))
    result: Any = run(params)
    total, metrics = result
    yield compare("loss from actions", total, io["loss/total"], robo.TOLERANCE)
    for name in METRICS[1:]:
        got, expected = metrics[name], io[f"pred/{name}_act"]
        yield compare(f"{name} from actions", got, expected, robo.TOLERANCE)


def _written(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray]) -> Row:
    """One action, greedily; the original drops the prompt's last column itself."""
    images = original.cameras(io, "infer/rgb", "infer/hand")
    images = {name: images[name] for name in model.config.structure.cameras}
    stop = io["batch/instr_and_action_ids"][0, 0, -1]
    text = np.append(io["infer/text"], [[stop]], axis=-1)
    observation = original.observation(images, text, np.ones(text.shape, bool))
    history = model.empty_history(1)
    prediction, _ = jax.jit(
        lambda: model.apply({"params": params}, observation, history, method="step")
    )()
    arm, is_open = prediction.arm[:, 0, 0], prediction.gripper[:, 0, :1] > 0
    got = jnp.concatenate([arm, jnp.where(is_open, 1.0, -1.0)], axis=-1)
    return compare("written action", got, io["infer/action_0"], robo.HEAD_TOLERANCE)
