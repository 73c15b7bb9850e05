"""Parity of OpenVLA and OpenVLA-OFT: the originals' torch models."""

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
from vla_jax.config import ModelConfig
from vla_jax.convert.openvla import names as openvla
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import image, vla, weights
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.backbones.prismatic import TOWERS, Prismatic
from vla_jax.models.heads.detokenizer import DetokenizerParity
from vla_jax.models.losses import NO_LABEL
from vla_jax.models.structures import splicing
from vla_jax.rules import flatten
from vla_jax.types import Actions, Observation

TOLERANCE, SAMPLE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 5e-4, 1e-3
CAMERAS = ("primary", "secondary", "wrist")
RULES = {"bounds_q99": "oft_quantile", "bounds": "oft_bounds"}
BLANK, STOP = 29871, 2


def arch(config: Mapping[str, Any]) -> dict[str, Any]:
    """Prismatic's architecture in the sizes of a folder."""
    towers = {}
    for name, reference, registers in zip(TOWERS, ("dino", "siglip"), (4, 0), strict=True):
        tower = config[reference]
        towers[name] = {
            "hidden_size": tower["embed_dim"],
            "num_hidden_layers": tower["depth"],
            "num_attention_heads": tower["num_heads"],
            "intermediate_size": int(tower["embed_dim"] * tower["mlp_ratio"]),
            "image_size": config["image_size"],
            "registers": registers,
        }
    text = config["text_config"]
    text = {k: v for k, v in text.items() if k in Prismatic.RELEASED["text_config"]}
    return Prismatic.arch({**towers, "text_config": text, "film": config.get("use_film", False)})


def model_config(config: Mapping[str, Any], text_len: int) -> ModelConfig:
    """A folder's model in our terms."""
    base = original.model_config({}, "prismatic", arch(config))
    oft, head = config["kind"] == "openvla_oft", config.get("head", "discrete")
    structure = dataclasses.replace(
        base.structure,
        kind="parallel" if oft else "discrete",
        chunk=config.get("chunk", 1),
        cameras=CAMERAS[: config.get("num_images", 1)],
        text_len=text_len,
        proprio=config["proprio_dim"] if config.get("use_proprio") else 0,
        parity=dataclasses.replace(base.structure.parity, act_insert="per_row", padded_mean=True),
    )
    return dataclasses.replace(
        base,
        action_dim=config.get("action_dim", 7),
        structure=structure,
        head=original.head_config(
            "l1" if head == "l1" else "detokenizer",
            hidden=config["text_config"]["hidden_size"],
            layers=2,
            gripper="number",
            # A random model's best ids are words, which the original reads as the ends.
            parity=DetokenizerParity(vocabulary="all"),
        ),
    )


def run(folder: Path) -> Iterator[Row]:
    """Weights, a training batch, an action, gradients."""
    io, config = golden.arrays(folder), golden.config(folder)
    reference = golden.weights(folder)
    model: Any = vla.build(model_config(config, io["train/input_ids"].shape[1]))
    full = dataclasses.replace(model.config.backbone, arch=model.arch)
    rows, ignore = openvla.rows(dataclasses.replace(model.config, backbone=full))
    params = pi0.load(rows, model, arrays.Arrays(reference), ignore)
    yield names.exported(rows, flatten(params), reference, ignore)
    yield from sizes(model, reference)
    if (folder / "full_param_names.txt").is_file():
        yield from full_names(folder, config)
    if "tok/ids" in io:
        yield from tokens(io)
    yield from pixels(model, io)
    yield from train(folder, model, rows, params, io, config)
    yield from act(model, params, io, config)


def sizes(model: Any, theirs: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """What the weights tell of the towers is what the folder says."""
    result = Prismatic.from_shapes({name: x.shape for name, x in theirs.items()})
    wrong = [n for n in TOWERS if result[n].items() - model.arch[n].items()]
    count = len(wrong) + (result["film"] != model.arch["film"])
    yield compare("towers read off the weights", count, 0, 0)


def full_names(folder: Path, config: Mapping[str, Any]) -> Iterator[Row]:
    """The full-size names and shapes: each read once, and the same set written."""
    lines = [x.split("\t") for x in (folder / "full_param_names.txt").read_text().splitlines()]
    reference = {line[0]: tuple(json.loads(line[1])) for line in lines}
    released = Prismatic.arch({"film": config.get("use_film", False)})
    sized = model_config(config, 64)
    options: dict[str, Any] = {**vars(sized.head), "hidden": 4096}
    sized = dataclasses.replace(
        sized,
        backbone=dataclasses.replace(sized.backbone, arch=released),
        head=original.head_config(**options),
    )
    tree = jax.eval_shape(lambda key: vla.initial_params(vla.build(sized), key), jax.random.key(0))
    ours = {path: leaf.shape for path, leaf in flatten(tree).items()}
    rows, ignore = openvla.rows(sized)
    report = weights.check(rows, ours, reference, ignore)
    problems = sum(map(len, (report.missing, report.unexpected, report.misshaped)))
    yield compare(f"{len(reference)} full-size names read once{report}", problems, 0, 0)
    written = {name for row in rows for name in row.expand(ours[row.targets[0]][0])}
    yield compare("the same full-size names written", len(written ^ reference.keys()), 0, 0)


def tokens(io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """The code between values and ids."""
    code = ActionTokenizer(32000)
    yield compare("ids", code.encode(io["tok/values_f64"]), io["tok/ids"], 0)
    rounded = io["tok/values_f64"].astype(np.float32)
    encoded = code.encode(jnp.asarray(rounded))
    yield compare("ids of the same values in float32", encoded, code.encode(rounded), 0)
    yield compare("values of ids", code.decode(io["tok/ids"]), io["tok/back_f64"], 0)
    yield compare("values of all ids", code.decode(io["tok/all_ids"]), io["tok/all_actions_f64"], 0)


def pixels(model: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Six numbers a pixel and camera: both towers' units."""
    for part in ("train", "predict"):
        observed = image.preprocess(jnp.asarray(io[f"{part}/images"]), model.image)
        units = zip(model.arch["means"], model.arch["stds"], strict=True)
        stacked = [(np.asarray(observed) - np.array(m)) / np.array(s) for m, s in units]
        reshaped = np.moveaxis(np.concatenate(stacked, axis=-1), -1, 2)
        reshaped = reshaped.reshape(len(reshaped), -1, *reshaped.shape[3:])
        yield compare(f"{part} pixels", reshaped, io[f"{part}/pixel_values"], 1e-5)


def observation(
    model: Any, pictures: np.ndarray, ids: np.ndarray, mask: np.ndarray, state: np.ndarray | None
) -> Observation:
    """A batch of one step a row."""
    names = model.config.structure.cameras
    observed = image.preprocess(jnp.asarray(pictures), model.image)
    return Observation(
        images={name: observed[:, i][:, None] for i, name in enumerate(names)},
        image_mask={name: jnp.ones((len(ids), 1), bool) for name in names},
        text=jnp.asarray(ids.astype(np.int32)),
        text_mask=jnp.asarray(mask.astype(bool)),
        proprio=None if state is None else jnp.asarray(state)[:, None],
    )


def batch(
    model: Any, io: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Observation, Actions]:
    """The folder's training batch: the prompts without the tokens of actions."""
    ids, labels = io["train/input_ids"], io["train/labels"]
    mask = io["train/attention_mask"]
    acts = labels > 31743
    count = int(acts[0].sum())
    padding = config["text_config"]["pad_token_id"]
    text, text_mask = np.full((len(ids), ids.shape[1] - count), padding), []
    for i, row in enumerate(ids):
        text[i] = row[~acts[i]]
        text_mask.append(mask[i][~acts[i]])
    chunk = io["train/actions"] if "train/actions" in io else io["train/actions_f64"][:, None]
    chunk = jnp.asarray(chunk.astype(np.float32))[:, None]
    observed = observation(
        model, io["train/images"], text, np.array(text_mask), io.get("train/proprio")
    )
    return observed, Actions(chunk, jnp.ones(chunk.shape[:-1], bool))


def train(
    folder: Path,
    model: Any,
    rows: list[weights.Weight],
    params: Any,
    io: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
) -> Iterator[Row]:
    """What the VLM sees in training, what it makes of it, loss and gradients."""
    observed, actions = batch(model, io, config)
    oft = config["kind"] == "openvla_oft"

    def look(m: Any) -> Any:
        if oft:
            arguments, first = m.tokens(observed)
            hidden = m.hidden(arguments)
            count = m.config.structure.chunk * m.config.action_dim
            read = splicing.take(hidden, first - 1 + jnp.arange(count))
            text = m.backbone.embed_text(observed.text)
            level = m.language(observed, text) if m.backbone.follows_language else None
        else:
            ids = m.head.encode(actions)
            sequence = m.sequence(m.encode(observed), splicing.step_mask(observed), observed, ids)
            arguments, hidden = sequence.tokens, m.backbone(sequence.tokens)
            read, level = splicing.take(hidden, sequence.columns), None
        pictures = jnp.stack([observed.images[c][:, 0] for c in m.config.structure.cameras], axis=1)
        each = pictures.reshape(-1, *pictures.shape[2:])
        wide = None if level is None else jnp.repeat(level, pictures.shape[1], axis=0)
        patches = m.backbone.patches(each, wide)
        features, valid = m.features(observed, actions)
        return arguments, hidden, read, patches, features, m.head.predict(features, valid, None)

    result: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))(params)
    inputs, hidden, read, patches, features, predicted = result
    valid, mask = np.asarray(inputs.valid), io["train/attention_mask"]
    images = np.ones((len(valid), valid.shape[1] - mask.shape[1]), bool)
    real = np.concatenate([mask[:, :1], images, mask[:, 1:]], axis=1)
    yield compare("who is there", valid, io.get("train/mm_mask", real), 0)
    if "train/inputs_embeds" in io:
        wanted = io["train/inputs_embeds"][valid]
        yield compare("sequence", np.asarray(inputs.embeds)[valid], wanted, TOLERANCE)
    if "train/patch_features" in io:
        wide = patches.reshape(len(valid), -1, patches.shape[-1])
        yield compare("patches", wide, io["train/patch_features"], TOLERANCE)
    wanted = io["train/last_hidden"][valid]
    yield compare("hidden states", np.asarray(hidden)[valid], wanted, TOLERANCE)
    if "train/actions_hidden" in io:
        yield compare("hidden states read", read, io["train/actions_hidden"], TOLERANCE)
    if "train/predicted" in io:
        values = np.concatenate([predicted.arm, predicted.gripper[..., None]], -1)[:, 0]
        yield compare("predicted", values, io["train/predicted"], TOLERANCE)
    if "train/pred_ids" in io:
        labels = io["train/labels"][:, 1:]
        # As many labels a row, at different columns.
        reference, wanted = (
            x[labels != NO_LABEL].reshape(len(labels), -1) for x in (io["train/pred_ids"], labels)
        )
        got = np.asarray(features[:, 0]).argmax(-1)
        yield compare("predicted ids", got, reference, 0)
        ours = model.apply({"params": params}, observed, actions, method="targets")
        yield compare("labels", np.asarray(ours)[:, 0], wanted, 0)

    def loss(p: Any) -> Any:
        return model.apply({"params": p}, observed, actions, None, 0.0, method="loss")

    (total, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    yield compare("loss", total, io["train/loss"], TOLERANCE)
    if "train/action_accuracy" in io:
        yield compare("right action tokens", parts["acc_arm"], io["train/action_accuracy"], 0)
    yield from gradients(folder, rows, grads, io)


def gradients(
    folder: Path, rows: list[weights.Weight], grads: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """Whole tensors that the folder holds, and the norm of every one's."""
    named = arrays.restacked(rows, {k: np.asarray(v) for k, v in flatten(grads).items()})
    for key in sorted(io):
        if key.startswith("grad/"):
            error = relative(named[key[5:]], io[key])
            yield Row(f"{key}, relative", error, GRADIENT_TOLERANCE, 1.0)
    expected = golden.config(folder, "grads.json")["norm"]
    off = {
        k: abs(float(np.linalg.norm(named[k])) - (v or 0.0)) / max(v or 0.0, 1e-3)
        for k, v in expected.items()
    }
    worst = max(off, key=off.__getitem__)
    yield Row(f"{len(off)} gradient norms, relative, {worst}", off[worst], GRADIENT_TOLERANCE, 1.0)
    silent = [k for k in named.keys() - expected.keys() if np.abs(named[k]).max() > 0]
    yield compare(f"gradients of what nothing reads {silent[:3]}", len(silent), 0, 0)


def act(
    model: Any, params: Any, io: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Iterator[Row]:
    """One action: the blank before the actions and the stop token behind them are the prompt's."""
    ids = io["predict/input_ids"]
    text = np.concatenate([ids, np.full((len(ids), 1), BLANK), np.full((len(ids), 1), STOP)], 1)
    state = io.get("predict/proprio")
    observed = observation(
        model, io["predict/images"], text, np.ones(text.shape, bool),
        None if state is None else state[None],
    )  # fmt: skip
    step = jax.jit(
        lambda p: model.apply({"params": p}, observed, model.empty_history(1), None, method="step")
    )
    prediction, history = step(params)
    values = np.concatenate([prediction.arm, prediction.gripper[..., None]], -1)[:, 0]
    entry = config["norm_stats"]["tiny_set"]
    rule = RULES[config["norm_type"]] if "norm_type" in config else "openvla_quantile"
    statistics = {"actions": entry["action"], "state": entry.get("proprio", entry["action"])}
    units = PolicyUnits.from_statistics(statistics, rule)
    expected = io["predict/actions_f64"]
    result = units.restore(values.astype(np.float64), np.zeros((1, 1)))[0]
    yield compare("actions", result.reshape(expected.shape), expected, SAMPLE_TOLERANCE)
    if config["kind"] == "openvla":
        written = io["predict/generated_ids"][:, -7:]
        yield compare("written ids", history.ids[:, -1], written, 0)
        yield from written_step(model, params, io, observed)
        return

    def look(m: Any) -> Any:
        arguments, first = m.tokens(observed)
        hidden = m.hidden(arguments)
        count = m.config.structure.chunk * m.config.action_dim
        read = splicing.take(hidden, first - 1 + jnp.arange(count))
        return arguments, hidden, read, m.features(observed)[0]

    result: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))(params)
    inputs, hidden, read, features = result
    yield compare("sequence, acting", inputs.embeds, io["predict/inputs_embeds"], TOLERANCE)
    yield compare("who is there, acting", inputs.valid, io["predict/mask"], 0)
    yield compare("hidden states, acting", hidden, io["predict/last_hidden"], TOLERANCE)
    yield compare("hidden states read, acting", read, io["predict/actions_hidden"], TOLERANCE)
    if "predict/token_ids" in io:
        best = np.asarray(features[:, 0, : read.shape[1]]).argmax(-1)
        yield compare("token ids", best, io["predict/token_ids"], 0)


def written_step(
    model: Any, params: Any, io: Mapping[str, np.ndarray], seen: Observation
) -> Iterator[Row]:
    """The written sequence read at once: patches, states of every layer, scores."""
    ids = jnp.asarray(io["predict/generated_ids"][:, -7:].astype(np.int32))[:, None]

    def look(m: Any) -> Any:
        pictures = seen.images["primary"][:, 0]
        sequence = m.sequence(m.encode(seen), splicing.step_mask(seen), seen, ids)
        run = m.backbone.text.run(sequence.tokens.embeds, sequence.tokens.valid, collect=True)
        read = splicing.take(run.hidden, sequence.columns)[:, :7]
        patches = m.backbone.patches(pictures)
        projected = m.backbone.projection(patches)
        return patches, projected, sequence.tokens, run, m.backbone.logits(read)

    result: Any = jax.jit(lambda p: model.apply({"params": p}, method=look))(params)
    patches, projected, inputs, run, scores = result
    yield compare("patches", patches, io["fwd/patch_features"], TOLERANCE)
    yield compare("projected", projected, io["fwd/projected"], TOLERANCE)
    n = io["fwd/inputs_embeds"].shape[1]
    yield compare("sequence, acting", inputs.embeds[:, :n], io["fwd/inputs_embeds"], TOLERANCE)
    yield compare("hidden states, layer 1", run.states[1][:, :n], io["fwd/hidden_1"], TOLERANCE)
    yield compare("hidden states, acting", run.hidden[:, :n], io["fwd/last_hidden"], TOLERANCE)
    scores = np.asarray(scores[0])
    top = np.argsort(-scores, axis=-1)[:, :8]
    yield compare("best ids", top, io["fwd/action_logits_top_ids"], 0)
    best = np.take_along_axis(scores, top, axis=-1)
    yield compare("best scores", best, io["fwd/action_logits_top"], TOLERANCE)
    expected = io["fwd/action_logits_last256"]
    yield compare("scores of actions", scores[:, 31744:32000], expected, TOLERANCE)
