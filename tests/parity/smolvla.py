"""Parity of SmolVLA: LeRobot's policy in torch."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import arrays
from tests.parity import golden, names, original, pi0
from tests.parity.table import Row, compare, relative
from vla_jax.config import ExpertConfig, ModelConfig
from vla_jax.convert.lerobot import names as lerobot
from vla_jax.inference.realtime import prefix_weights
from vla_jax.models import image, vla, weights
from vla_jax.models.backbones.smolvlm import SmolVLM
from vla_jax.rules import flatten
from vla_jax.types import Actions, Guide, Observation

TOLERANCE, SAMPLE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 5e-4, 1e-3
CAMERAS = ("primary", "wrist", "secondary")


def arch(config: Mapping[str, Any]) -> dict[str, Any]:
    """SmolVLM's architecture in the sizes of a folder."""
    text = {k: v for k, v in config["text"].items() if k in SmolVLM.RELEASED["text_config"]}
    # SmolVLA's own, whatever the text model's config says.
    text |= {"num_hidden_layers": config["num_vlm_layers"], "rope_theta": 10000.0}
    vision = {k: v for k, v in config["vision"].items() if k in SmolVLM.RELEASED["vision_config"]}
    return SmolVLM.arch(
        {"scale_factor": config["scale_factor"], "text_config": text, "vision_config": vision}
    )


def model_config(config: Mapping[str, Any], cameras: int, text_len: int) -> ModelConfig:
    """A folder's model in our terms."""
    base = original.model_config({}, "smolvlm", arch(config))
    layers = config["num_expert_layers"]
    crosses = "cross" in config["attention_mode"]
    marks = config["image_special_ids"] if config["add_image_special_tokens"] else ()
    return dataclasses.replace(
        base,
        action_dim=config["action_dim"],
        structure=dataclasses.replace(
            base.structure,
            kind="expert",
            chunk=config["chunk_size"],
            cameras=CAMERAS[:cameras],
            text_len=text_len,
            proprio=config["state_dim"],
        ),
        head=original.head_config("expert_flow", gripper="number"),
        expert=ExpertConfig(
            width=config["expert_hidden"],
            hidden=config["expert_intermediate"],
            layers=max(layers, 0),
            adaptive=False,
            joint_every=config["self_attn_every_n_layers"] if crosses else 1,
            causal=True,
            state="prefix",
            scaled_prefix=True,
            marks_before=tuple(marks[:-1]),
            marks_behind=tuple(marks[-1:]),
            prompt="smolvla",
            images="lerobot",
            padded=config["max_action_dim"],
            loss="real",
        ),
    )


def run(folder: Path) -> Iterator[Row]:
    """Prefix, hidden states, losses, samples, gradients."""
    io, config = golden.arrays(folder), golden.config(folder)
    cameras = sorted(k for k in io if k.startswith("prep/image"))
    model: Any = vla.build(model_config(config, len(cameras), io["obs/tokens"].shape[1]))
    reference = arrays.Arrays(golden.weights(folder))
    rows = lerobot.rows(model)
    params = pi0.load(rows, model, reference)
    yield names.exported(rows, flatten(params), golden.weights(folder), ())
    observed = observation(io, len(cameras))
    yield from _images(model, io)
    yield from _forward(model, params, io, observed)
    yield from _gradients(folder, rows, model, params, io, observed)
    start = jnp.asarray(io["sample/noise"])
    for count in config["sample_steps"]:
        head = dataclasses.replace(model.config.head, sampling_steps=count)
        chosen = vla.build(dataclasses.replace(model.config, head=head), model.arch)
        compiled = jax.jit(
            lambda p, m=chosen: m.apply({"params": p}, observed, start, method="sample")
        )
        expected = io[f"sample/actions_{count}"]
        yield compare(f"actions, {count} steps", compiled(params), expected, SAMPLE_TOLERANCE)
    if "rtc/prev" in io:
        yield from _guided(model, params, io, config, observed)


def _guided(
    model: Any,
    params: Any,
    io: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    seen: Observation,
) -> Iterator[Row]:
    """Real-time chunking as LeRobot has it: no Jacobian, and a limit of 10."""
    chunk = config["chunk_size"]
    for name in sorted(k for k in io if k.startswith("rtc/weights/")):
        schedule, start, end = name.removeprefix("rtc/weights/").rsplit("_", 2)
        result = prefix_weights(int(start), int(end), chunk, schedule.lower())
        yield compare(f"weights, {schedule} {start} to {end}", result, io[name], 1e-6)
    previous = io["rtc/prev"]
    aligned = jnp.pad(previous, ((0, 0), (0, chunk - previous.shape[1]), (0, 0)))
    head = dataclasses.replace(model.config.head, sampling_steps=max(config["sample_steps"]))
    chosen = vla.build(dataclasses.replace(model.config, head=head), model.arch)
    start = jnp.asarray(io["sample/noise"])
    for name in sorted(k for k in io if k.startswith("rtc/actions_")):
        # The recording without gradients is of the same form: LeRobot's never needs them.
        schedule = name.rsplit("_", 1)[1]
        rows = jnp.broadcast_to(io[f"rtc/weights/{schedule}_2_4"], (len(previous), chunk))
        guide = Guide(aligned, rows, limit=10.0, jacobian=False)
        observation = dataclasses.replace(seen, guide=guide)
        sample: Any = jax.jit(lambda p, o: chosen.apply({"params": p}, o, start, method="sample"))
        yield compare(name, sample(params, observation), io[name], SAMPLE_TOLERANCE)


def observation(io: Mapping[str, np.ndarray], cameras: int) -> Observation:
    """The folder's batch; its prepared images, whose resizing is compared by itself."""
    images = {
        name: jnp.asarray(np.moveaxis(io[f"prep/image{i}"], 1, -1))[:, None]
        for i, name in enumerate(CAMERAS[:cameras])
    }
    observed = {
        name: jnp.asarray(io[f"prep/mask{i}"].astype(bool))[:, None]
        for i, name in enumerate(CAMERAS[:cameras])
    }
    return Observation(
        images=images,
        image_mask=observed,
        text=jnp.asarray(io["obs/tokens"].astype(np.int32)),
        text_mask=jnp.asarray(io["obs/token_mask"].astype(bool)),
        proprio=jnp.asarray(io["obs/state"])[:, None],
    )


def _images(model: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    names = sorted(k for k in io if k.startswith("obs/observation.images") and io[k].ndim == 4)
    for i, name in enumerate(names):
        pixels = image.preprocess(jnp.asarray(io[name]), model.image)
        expected = np.moveaxis(io[f"prep/image{i}"], 1, -1)
        # Ours rounds to whole grey levels, 2 / 255 here, before they are scaled.
        yield compare(f"image {i}", pixels, expected, 1.01 / 255)


def _forward(
    model: Any, params: Any, io: Mapping[str, np.ndarray], seen: Observation
) -> Iterator[Row]:
    noise, time = jnp.asarray(io["noise"]), jnp.asarray(io["time"])
    chunk = jnp.asarray(io["obs/action"])[:, None]
    mask = ~jnp.asarray(io["action_is_pad"].astype(bool))[:, None]
    actions = Actions(chunk, mask)

    def look(m: Any) -> Any:
        embeds, valid, mask = m.prefix_tokens(seen)
        result = m.prefix(seen)
        hidden = m.backbone.read_prefix(embeds, valid, mask).hidden
        noisy, wanted = m.head.mix(m.head.values(actions), noise, time)
        tokens = m.head.tokens(noisy, time)
        velocity = m.velocity(result.cache, seen.proprio, noisy, time)
        error = m.head.errors(velocity, wanted)
        total, parts = m.head.flow_loss(error, actions)
        rows = parts["rows"]
        return embeds, valid, mask, result, hidden, tokens, noisy, velocity, total, rows

    run: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))
    embeds, valid, mask, result, hidden, tokens, noisy, outcome, total, rows = run(params)
    count = valid.shape[1]  # theirs may be padded to a length
    yield compare("prefix", embeds, io["prefix/embs"][:, :count], TOLERANCE)
    yield compare("prefix is there", valid, io["prefix/pad_mask"][:, :count], 0)
    ours = np.asarray(mask) & np.asarray(valid)[:, :, None]
    yield compare("who sees whom", ours, io["attn_mask"][:, :count, :count], 0)
    positions = np.cumsum(np.asarray(valid), 1) - 1
    yield compare("positions", positions, io["positions"][:, :count], 0)
    yield compare("noisy actions", noisy, io["x_t"], 1e-6)
    yield compare("expert's tokens", tokens, io["suffix/embs"], TOLERANCE)
    real = np.asarray(valid)
    hidden = np.asarray(hidden)[real]
    yield compare("hidden states, VLM", hidden, io["out/prefix"][:, :count][real], TOLERANCE)
    for name, retained in (("k", result.cache.keys), ("v", result.cache.values)):
        expected = np.moveaxis(io[f"sample/kv_{name}"], 2, 3)[:, :, :count][:, real]
        yield compare(f"cache, {name}", np.asarray(retained)[:, real], expected, TOLERANCE)
    yield compare("velocity", outcome, io["out/v_t"], pi0.VELOCITY_TOLERANCE)
    yield compare("loss", total, io["loss_mean_with_pad"], TOLERANCE)
    yield compare("loss of every sample", rows, io["loss_per_sample"], TOLERANCE)


def _gradients(
    folder: Path,
    rows: list[weights.Weight],
    model: Any,
    params: Any,
    io: Mapping[str, np.ndarray],
    seen: Observation,
) -> Iterator[Row]:
    """Of the mean loss of all steps: tensors that the folder holds, and the norm of every one's."""
    noise, time = jnp.asarray(io["noise"]), jnp.asarray(io["time"])
    chunk = jnp.asarray(io["obs/action"])[:, None]
    actions = Actions(chunk, jnp.ones(chunk.shape[:-1], bool))

    def loss(p: Any) -> Any:
        args = seen, actions, noise, time
        return model.apply({"params": p}, *args, method="errors")[0].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = golden.config(folder, "grads.json")
    yield compare("loss of all steps", value, expected["loss"], TOLERANCE)
    named = arrays.restacked(rows, {k: np.asarray(v) for k, v in flatten(grads).items()})
    for key in sorted(k for k in io if k.startswith("grad/")):
        yield Row(f"{key}, relative", relative(named[key[5:]], io[key]), GRADIENT_TOLERANCE, 1.0)
    norms = {name: float(np.linalg.norm(named[name])) for name in expected["norm"]}
    worst = max(abs(norms[k] - v) / max(v, 1e-3) for k, v in expected["norm"].items())
    yield Row(f"{len(norms)} gradient norms, relative", worst, GRADIENT_TOLERANCE, 1.0)
