"""Parity of pi0 and pi0.5: openpi's JAX and torch models, with and without LoRA."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from tests import arrays
from tests.parity import golden, names, original
from tests.parity.table import Row, compare, relative
from vla_jax.config import ExpertConfig, ModelConfig, OptimConfig
from vla_jax.convert import maps
from vla_jax.convert.openpi import names as openpi
from vla_jax.convert.openpi.lora import Merged, has_factors
from vla_jax.convert.openpi.source import Unstacked
from vla_jax.models import vla, weights
from vla_jax.models.backbones.paligemma import PaliGemma
from vla_jax.rules import flatten, unflatten
from vla_jax.train.optim import make_optimizer, make_schedule, moving_average
from vla_jax.types import Actions, Observation

TOLERANCE, SAMPLE_TOLERANCE = 1e-4, 5e-4
# Of one velocity, which samples are sums of: measured 1.1e-4, of values up to 4.5.
VELOCITY_TOLERANCE = 2e-4
# Of gradients, relative to the largest of a tensor.
GRADIENT_TOLERANCE = 1e-3
# PaliGemma as openpi has it: the words without the tokens that its transformers files add.
FULL = PaliGemma.arch({"mask": "prefix", "text_config": {"vocab_size": 257152}})
# Of a folder's three steps: openpi's own, but for rate and length.
RECIPE = {
    "learning_rate": 1e-3, "warmup_steps": 2, "warmup_from": "one", "schedule": "half_cosine",
    "min_scale": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 1e-10, "clip_norm": 1.0,
    "decays": (), "rates": (), "muon": (),
}  # fmt: skip
CAMERAS = {
    "base_0_rgb": "primary", "left_wrist_0_rgb": "wrist", "right_wrist_0_rgb": "secondary",
}  # fmt: skip


def arch(config: Mapping[str, Any]) -> dict[str, Any]:
    """PaliGemma's architecture in the sizes of a folder."""
    text, vision = config["paligemma"], config["siglip"]
    return PaliGemma.arch(
        {
            "mask": "prefix",
            "hidden_size": text["width"],
            "projection_dim": text["width"],
            "vision_config": {
                "hidden_size": vision["width"],
                "num_hidden_layers": vision["depth"],
                "num_attention_heads": vision["num_heads"],
                "intermediate_size": vision["mlp_dim"],
                "patch_size": vision["patch_size"][0],
                "image_size": config["image_resolution"][0],
            },
            "text_config": {
                "vocab_size": config["vocab_size"],
                "hidden_size": text["width"],
                "num_hidden_layers": text["depth"],
                "num_attention_heads": text["num_heads"],
                "num_key_value_heads": text["num_kv_heads"],
                "head_dim": text["head_dim"],
                "intermediate_size": text["mlp_dim"],
            },
        }
    )


def model_config(config: Mapping[str, Any], state: int, insulate: bool = False) -> ModelConfig:
    """A folder's model in our terms; all of its numbers are the robot's."""
    base = original.model_config({}, "paligemma", arch(config))
    adaptive, dim = config["kind"] == "pi05", config["action_dim"]
    expert = config["action_expert"]
    return dataclasses.replace(
        base,
        action_dim=dim,
        structure=dataclasses.replace(
            base.structure,
            kind="expert",
            chunk=config["action_horizon"],
            cameras=tuple(CAMERAS.values()),
            text_len=config["max_token_len"],
            proprio=state,
        ),
        head=original.head_config("expert_flow", gripper="number"),
        expert=ExpertConfig(
            width=expert["width"],
            hidden=expert["mlp_dim"],
            adaptive=adaptive,
            state="none" if adaptive else "expert",
            prompt="pi05" if adaptive else "pi0",
            padded=dim,
            insulate=insulate,
        ),
    )


def run(folder: Path) -> Iterator[Row]:
    """The JAX model: prefix, hidden states, loss, samples, gradients."""
    io, config = golden.arrays(folder), golden.config(folder)
    model = vla.build(model_config(config, io["obs/state"].shape[-1]))
    reference = arrays.Arrays(golden.weights(folder))
    lora = has_factors(reference)
    if lora:
        reference = Merged(reference, lambda name: alpha(config, name))
    source = Unstacked(reference)
    rows = openpi.jax_rows(model.config, model.arch)
    params = load(rows, model, source)
    yield names.exported(
        rows, flatten(params), {name: source.read(name) for name in source.shapes}, ()
    )
    if (folder / "full_param_names.txt").is_file():
        yield from full(folder)
    yield from forward(model, params, io)
    yield from samples(model, params, io, config)
    yield from insulation(model, params, io)
    if not lora:
        yield from gradients(folder, rows, model, params, io)


def full(folder: Path) -> Iterator[Row]:
    """The full-size names and shapes: each read once, and the same set written."""
    lines = [
        line.split("\t") for line in (folder / "full_param_names.txt").read_text().splitlines()
    ]
    reference = {line[0]: tuple(json.loads(line[1])) for line in lines if "alias" not in line[3]}
    config = golden.config(folder)
    is_torch = any(name.startswith("paligemma_with_expert") for name in reference)
    sizes = model_config(config, config["action_dim"])
    sizes = dataclasses.replace(
        sizes,
        backbone=dataclasses.replace(sizes.backbone, arch=FULL),
        expert=dataclasses.replace(sizes.expert, width=1024, hidden=4096, padded=32),
    )
    model = vla.build(sizes)
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    ours = {path: leaf.shape for path, leaf in flatten(tree).items()}
    if is_torch:
        rows, ignore = openpi.torch_rows(model.config, model.arch), openpi.TORCH_IGNORE
    else:
        rows, ignore = openpi.jax_rows(model.config, model.arch), ()
        reference = Unstacked(Merged(Shapes(reference))).shapes
    report = weights.check(rows, ours, reference, ignore)
    problems = sum(map(len, (report.missing, report.unexpected, report.misshaped)))
    yield compare(f"{len(reference)} full-size names read once", problems, 0, 0)
    written = {name for row in rows for name in row.expand(ours[row.targets[0]][0])}
    carried = {name for name in reference if not weights.ignored(name, ignore)}
    yield compare("the same full-size names written", len(written ^ carried), 0, 0)


class Shapes:
    """Names and shapes as a source, of which nothing can be read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = dict(shapes)
        self.dtypes = {name: np.dtype(np.float32) for name in shapes}

    def read(self, name: str) -> np.ndarray:
        raise NotImplementedError

    def place(self, name: str) -> str:
        return name


def alpha(config: Mapping[str, Any], name: str) -> float:
    """Of a LoRA weight, by the expert it belongs to."""
    return config["action_expert" if "_1/" in name else "paligemma"]["lora"][1]


def torch(folder: Path) -> Iterator[Row]:
    """The torch port's file: the same parameters to the bit, so the same model."""
    io, config = golden.arrays(folder), golden.config(folder)
    twin = folder.parent / folder.name.replace("torch_", "")
    reference = arrays.Arrays(golden.weights(folder))
    other = golden.arrays(twin) if (twin / "io.npz").is_file() else {}
    state = config["action_dim"]
    model = vla.build(model_config(config, state))
    rows = openpi.torch_rows(model.config, model.arch)
    params = load(rows, model, reference, openpi.TORCH_IGNORE)
    yield names.exported(
        rows,
        flatten(params),
        {name: reference.read(name) for name in reference.shapes},
        openpi.TORCH_IGNORE,
    )
    if (folder / "full_param_names.txt").is_file():
        yield from full(folder)
    if not other:
        return
    source = Unstacked(arrays.Arrays(golden.weights(twin)))
    same = load(openpi.jax_rows(model.config, model.arch), model, source)
    result, wanted = flatten(params), flatten(same)
    changed = [k for k in wanted if not np.array_equal(result[k], wanted[k])]
    yield compare(f"parameters that differ from the JAX file's {changed[:3]}", len(changed), 0, 0)
    yield from samples(model, params, other | io, config)
    noise = other | io
    error = jax.jit(lambda p: losses(model, p, other, "found"))(params)
    squared = np.square(np.asarray(error) - noise["u_t"])
    yield compare("loss", squared.mean(-1), io["loss"].mean(-1), TOLERANCE)


def load(
    rows: list[weights.Weight], model: vla.VLA, source: Any, ignore: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Our parameters from their tensors, strictly."""
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    result = maps.incoming(rows, shapes, source, ignore)
    return unflatten({path: jnp.asarray(leaf.read()) for path, leaf in result.leaves.items()})


def observation(io: Mapping[str, np.ndarray], side: int) -> Observation:
    """`obs/*`; images of another size than the model's are resized as openpi does."""
    images, recorded = {}, {}
    for reference, ours in CAMERAS.items():
        pixels = io[f"obs/image/{reference}"]
        scaled = pixels.astype(np.float32) / 255.0 * 2.0 - 1.0
        if pixels.shape[1] != side:
            scaled = _resized(scaled, side)
        images[ours] = jnp.asarray(scaled)[:, None]
        recorded[ours] = jnp.asarray(io[f"obs/image_mask/{reference}"])[:, None]
    return Observation(
        images=images,
        image_mask=recorded,
        text=jnp.asarray(io["obs/tokenized_prompt"].astype(np.int32)),
        text_mask=jnp.asarray(io["obs/tokenized_prompt_mask"].astype(bool)),
        proprio=jnp.asarray(io["obs/state"])[:, None],
    )


def _resized(images: np.ndarray, side: int) -> Any:
    from vla_jax.models import letterbox

    height, width = letterbox.shape_within(images.shape[1], images.shape[2], side, side)
    interpolated = letterbox.interpolate(jnp.asarray(images), height, width, "linear")
    return letterbox.paste(interpolated, side, side, corner=False, background=-1.0)


def actions(io: Mapping[str, np.ndarray]) -> Actions:
    """`actions`, all of them supervised."""
    chunk = jnp.asarray(io["actions"])[:, None]
    return Actions(chunk, jnp.ones(chunk.shape[:-1], bool))


def losses(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray], what: str = "error") -> Any:
    """Errors [b, f] at the folder's noise and times, or the velocities."""
    observed = observation(io, model.image.size)
    noise, time = jnp.asarray(io["noise"]), jnp.asarray(io["time"])
    args = (observed, actions(io), noise, time)
    error, result = model.apply({"params": params}, *args, method="errors")
    return error if what == "error" else result


def forward(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """What the VLM and the expert see, and what comes out."""
    observed = observation(io, model.image.size)
    noise, time = jnp.asarray(io["noise"]), jnp.asarray(io["time"])

    def look(m: Any) -> Any:
        embeds, valid, mask = m.prefix_tokens(observed)
        result = m.prefix(observed)
        hidden = m.backbone.read_prefix(embeds, valid, mask).hidden
        noisy, wanted = m.head.mix(m.head.values(actions(io)), noise, time)
        tokens, level = m.head.tokens(noisy, time), m.head.level(time)
        if m.config.expert.state == "expert":
            state = jnp.asarray(observed.proprio)[:, 0]
            tokens = jnp.concatenate([m.head.state_token(state), tokens], axis=1)
        velocity = m.velocity(result.cache, observed.proprio, noisy, time)
        return embeds, valid, mask, result, hidden, tokens, level, noisy, wanted, velocity

    run: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))
    embeds, valid, mask, result, hidden, tokens, level, noisy, wanted, outcome = run(params)
    # Image tokens are divided by the scale that the decoder multiplies all tokens by.
    width = embeds.shape[-1]
    yield compare("prefix", embeds * width**0.5, io["prefix/tokens"], TOLERANCE)
    yield compare("prefix is there", valid, io["prefix/input_mask"], 0)
    count = valid.shape[1]
    reference = io["attn_mask"][:, :count, :count]
    ours = np.asarray(mask) & np.asarray(valid)[:, :, None]
    yield compare("who sees whom", ours, reference, 0)
    positions = np.cumsum(np.asarray(valid), 1) - 1
    yield compare("positions", positions, io["positions"][:, :count], 0)
    yield compare("noisy actions", noisy, io["x_t"], 1e-6)
    yield compare("velocity wanted", wanted, io["u_t"], 1e-6)
    yield compare("expert's tokens", tokens, io["suffix/tokens"], TOLERANCE)
    if level is not None:
        yield compare("condition", level, io["suffix/adarms_cond"], TOLERANCE)
    real = np.asarray(valid)
    hidden = np.asarray(hidden)[real]
    yield compare("hidden states, VLM", hidden, io["out/prefix"][real], TOLERANCE)
    yield compare("velocity", outcome, io["out/v_t"], VELOCITY_TOLERANCE)
    for name, retained in (("k", result.cache.keys), ("v", result.cache.values)):
        expected = io[f"sample/kv_{name}"][:, real]
        yield compare(f"cache, {name}", np.asarray(retained)[:, real], expected, TOLERANCE)
    error = jax.jit(lambda p: losses(model, p, io))(params)
    yield compare("loss", error, io["loss"], TOLERANCE)


def samples(
    model: vla.VLA, params: Any, io: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Iterator[Row]:
    """Chunks denoised from the folder's noise, in two numbers of steps."""
    observed, start = observation(io, model.image.size), jnp.asarray(io["sample/noise"])
    options: Any = model.config.head
    for count in config["sample_steps"]:
        head = dataclasses.replace(options, sampling_steps=count)
        chosen = vla.build(dataclasses.replace(model.config, head=head), model.arch)
        compiled = jax.jit(
            lambda p, m=chosen: m.apply({"params": p}, observed, start, method="sample")
        )
        expected = io[f"sample/actions_{count}"]
        yield compare(f"actions, {count} steps", compiled(params), expected, SAMPLE_TOLERANCE)


def insulation(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Without a gradient into the VLM, the expert's own is the same, and the VLM's is zero."""
    expert = dataclasses.replace(model.config.expert, insulate=True)
    apart = vla.build(dataclasses.replace(model.config, expert=expert), model.arch)
    grads = [
        flatten(jax.jit(jax.grad(lambda p, m=m: losses(m, p, io).mean()))(params))
        for m in (model, apart)
    ]
    vlm = [jnp.abs(g).max() for k, g in grads[1].items() if k.startswith("backbone/")]
    yield compare("gradient into the insulated VLM", max(map(float, vlm)), 0, 0)
    worst = max(
        relative(grads[1][k], g) for k, g in grads[0].items() if not k.startswith("backbone/")
    )
    yield Row("gradient of the expert, insulated", worst, 1e-5, 1.0)


def gradients(
    folder: Path,
    rows: list[weights.Weight],
    model: vla.VLA,
    params: Any,
    io: Mapping[str, np.ndarray],
) -> Iterator[Row]:
    """Of the mean loss: whole tensors that the folder holds, and the norm of every one's."""
    grads = flatten(jax.jit(jax.grad(lambda p: losses(model, p, io).mean()))(params))
    named = arrays.restacked(rows, {k: np.asarray(v) for k, v in grads.items()})
    for key in sorted(io):
        if key.startswith("grad/") and key[5:] in named:
            error = relative(named[key[5:]], io[key])
            yield Row(f"{key}, relative", error, GRADIENT_TOLERANCE, 1.0)
    norms = golden.config(folder, "grads.json")
    yield _norms("gradient norms", norms["norm"], rows, grads)
    yield from optimizer(model, params, io, norms, rows)


def optimizer(
    model: vla.VLA,
    params: Any,
    io: Mapping[str, np.ndarray],
    norms: Mapping[str, Mapping[str, float]],
    rows: list[weights.Weight],
) -> Iterator[Row]:
    """Three steps of openpi's recipe on the same batch: rates, losses, parameters, average."""
    raw = base.get_config().to_dict()["optim"]
    config = OptimConfig(**(raw | RECIPE))
    chain, schedule = make_optimizer(config, 10), make_schedule(config, 10)
    flat = flatten(params)
    state, average = chain.init(flat), flat
    step = jax.jit(jax.value_and_grad(lambda f: losses(model, unflatten(f), io).mean()))
    collected, rates, sizes = [], [], []
    for i in range(len(io["train/lr"])):
        loss, grads = step(flat)
        collected.append(loss)
        rates.append(schedule(i))
        sizes.append(optax.global_norm(grads))
        updates, state = chain.update(grads, state, flat)
        flat: Any = optax.apply_updates(flat, updates)
        average = moving_average(average, flat, i, 0.99, warmup=False)
    collected.append(step(flat)[0])
    yield compare("rates", rates, io["train/lr"], 1e-9)
    yield Row("gradient norms of the steps", relative(sizes, io["train/grad_norm"]), 1e-3, 1.0)
    yield compare("losses of the steps", collected, io["train/losses"], TOLERANCE)
    yield _norms("parameters after the steps", norms["param_norm_after3"], rows, flat)
    yield _norms("average after the steps", norms["ema_norm_after3"], rows, average)


def _norms(what: str, expected: Mapping[str, float], rows: list[weights.Weight], ours: Any) -> Row:
    ours = arrays.restacked(rows, {k: np.asarray(v) for k, v in ours.items()})
    known = {k: v for k, v in expected.items() if k in ours}
    # Gradients of key biases are analytically zero, so their norms are rounding.
    worst = max(abs(float(np.linalg.norm(ours[k])) - v) / max(v, 1e-3) for k, v in known.items())
    return Row(f"{len(known)} {what}, relative", worst, GRADIENT_TOLERANCE, 1.0)
