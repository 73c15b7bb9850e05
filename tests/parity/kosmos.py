"""Parity cases of Kosmos-2 and RoboKosMos."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.config import BackboneConfig, HeadConfig, ModelConfig, StructureConfig
from vla_jax.convert import maps
from vla_jax.models import vla, weights
from vla_jax.models.backbones import kosmos2
from vla_jax.rules import flatten, unflatten
from vla_jax.train.losses import action_loss
from vla_jax.types import Actions, Observation

# Every tiny model of the golden set has four heads in both towers; shapes do not tell.
HEADS = 4
TOLERANCE = 1e-4
HEAD_TOLERANCE = 1e-5
# Gradients of these models are 1e-4 to 1e-2, so the general tolerance would say little.
GRADIENT_TOLERANCE = 1e-6


def hf(folder: Path) -> Iterator[Row]:
    """Kosmos2ForConditionalGeneration on ids with images, and on embeddings."""
    io, arch = golden.arrays(folder), kosmos2.arch(golden.config(folder), strict=False)
    model = vla.build(_config(_structure({}), _head({})), arch).clone()
    params = _load(maps.hugging_face(model.config), model, golden.weights(folder), "backbone/")
    backbone = kosmos2.Kosmos2(arch, remat="none")
    tree = {"params": params["backbone"]}

    def run(method: Any, *args: Any) -> Any:
        return backbone.apply(tree, *args, method=method)

    images = jnp.asarray(_image(io["in/pixel_values"]))
    vision = run(lambda m, x: m.vision(x), images)
    tokens = run("encode_images", images)
    yield compare("vision tower", vision, io["out/vision_last_hidden"], TOLERANCE)
    yield compare("image tokens", tokens, io["out/image_embeds"], TOLERANCE)

    ids = io["in/input_ids"].astype(np.int32)
    valid = jnp.asarray(io["in/attention_mask"].astype(bool))
    embeds = np.array(run("embed_text", jnp.asarray(ids)))
    embeds[io["in/image_embeds_position_mask"].astype(bool)] = np.asarray(tokens).reshape(
        -1, embeds.shape[-1]
    )
    # Given ids, the original numbers only the tokens that are not padding.
    pad = arch["text_config"]["pad_token_id"]
    real = ids != pad
    positions = np.cumsum(real, axis=1) * real + pad
    hidden = run("__call__", jnp.asarray(embeds), valid, jnp.asarray(positions, jnp.int32))
    yield compare("last hidden", hidden, io["out/last_hidden"], TOLERANCE)
    yield compare("logits", run("logits", hidden), io["out/logits"], TOLERANCE)

    embeds, valid = jnp.asarray(io["in/inputs_embeds"]), jnp.asarray(io["in/embeds_mask"] == 1)
    logits = run("logits", run("__call__", embeds, valid))
    yield compare("logits from embeds", logits, io["out/logits_from_embeds"], TOLERANCE)


def robo(folder: Path) -> Iterator[Row]:
    """RoboKosMos with the LSTM head: loss, actions, gradients, streaming, AdamW."""
    io, original = golden.arrays(folder), golden.config(folder)
    theirs = golden.weights(folder)
    model = vla.build(_config(_structure(original), _head(original)), _arch(theirs))
    rows, ignore = maps.robovlms(model.config, prefix="")
    params = _load((rows, ignore), model, theirs)
    observation, actions = _batch(io, "batch", model.config)

    def loss(params: Any) -> Any:
        prediction = model.apply({"params": params}, observation)
        total, metrics = action_loss(prediction, actions, original["arm_gripper_loss_ratio"])  # type: ignore[arg-type]
        return total, (prediction, metrics)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, (prediction, metrics)), grads = step(params)

    features = model.apply(
        {"params": params},
        observation.images["primary"].reshape(-1, *observation.images["primary"].shape[2:]),
        method=lambda m, x: m.backbone.encode_images(x),
    )
    yield compare("image tokens", features, io["fwd/image_features_0"][:, 0], TOLERANCE)
    yield compare("arm", prediction.arm, io["fwd/arm"], HEAD_TOLERANCE)
    yield compare("gripper", prediction.gripper, io["fwd/gripper"][..., 0], HEAD_TOLERANCE)
    yield compare("loss", total, io["loss/total"], TOLERANCE)
    yield compare("loss arm", metrics["loss_arm"], io["pred/loss_arm_act"], TOLERANCE)
    yield compare("loss gripper", metrics["loss_gripper"], io["pred/loss_gripper_act"], TOLERANCE)
    yield compare("acc gripper", metrics["acc_gripper"], io["pred/acc_gripper_act"], TOLERANCE)

    yield from _streaming(model, params, io)
    yield from _gradients(folder, rows, grads, io)
    if "after1/param_norms" in io:
        yield from _optimizer(folder, rows, params, step, io)


def _streaming(model: vla.VLA, params: Any, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    rgb, text = io["infer/rgb"], io["infer/text"].astype(np.int32)
    history = vla.empty_history(model.config, model.arch, 1)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    arms, grippers = [], []
    for t in range(rgb.shape[1]):
        images = {"primary": _image(rgb[:, t : t + 1])}
        if "infer/hand" in io:
            images["wrist"] = _image(io["infer/hand"][:, t : t + 1])
        prediction, history = step(_observation(images, text, np.ones(text.shape, bool)), history)
        arms.append(np.asarray(prediction.arm))
        grippers.append(np.asarray(prediction.gripper))
    expected = np.stack([io[f"infer/arm_{t}"] for t in range(len(arms))])
    yield compare("streaming arm", np.stack(arms), expected, HEAD_TOLERANCE)
    expected = np.stack([io[f"infer/gripper_{t}"] for t in range(len(arms))])[..., 0]
    # Newer steps report decisions, older ones logits; compare what the folder holds.
    got = np.stack(grippers)
    if set(np.unique(expected)) <= {0.0, 1.0}:
        got = (got > 0).astype(np.float32)
    yield compare("streaming gripper", got, expected, HEAD_TOLERANCE)


def _gradients(
    folder: Path, rows: list[weights.Weight], grads: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    named = _theirs(rows, grads)
    for key in io:
        if key.startswith("grad/"):
            yield compare(key, named[key[5:]], io[key], GRADIENT_TOLERANCE)
    norms = golden.config(folder, "grads.json")["grad_norms"]
    known = [n for n, v in norms.items() if v is not None]
    got = np.array([np.linalg.norm(named[n]) for n in known])
    yield compare(f"{len(known)} gradient norms", got, [norms[n] for n in known], TOLERANCE)


def _optimizer(
    folder: Path, rows: list[weights.Weight], params: Any, step: Any, io: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    names = list(golden.config(folder, "trainable_names.json"))
    adamw = optax.adamw(golden.config(folder, "meta.json")["lr"], weight_decay=0.0)
    state, losses = adamw.init(params), []
    for i in range(len(io["train/losses"])):
        (total, _), grads = step(params)
        updates, state = adamw.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(total))
        if i == 0:
            named = _theirs(rows, params)
            for key in io:
                if key.startswith("after1/") and key != "after1/param_norms":
                    yield compare(key, named[key[7:]], io[key], TOLERANCE)
            yield _norms("after1", names, named, io["after1/param_norms"])
    yield compare("5 AdamW losses", losses, io["train/losses"], TOLERANCE)
    yield _norms("after5", names, _theirs(rows, params), io["train/param_norms_after5"])


def _norms(
    when: str, names: list[str], named: Mapping[str, np.ndarray], expected: np.ndarray
) -> Row:
    """Ratios, since norms reach 50 and the original summed them in float32."""
    got = np.array([np.linalg.norm(named[n]) for n in names])
    ratio = got / expected
    return compare(f"{when}/{len(names)} norms, ratio", ratio, np.ones_like(ratio), TOLERANCE)


def supports(original: Mapping[str, Any]) -> str:
    """Empty when `robo` can run a RoboVLMs config, else what is missing."""
    head = original["act_head"]
    wanted = {
        "robovlm_name": (original["robovlm_name"], "RoboKosMos"),
        "head": (head["type"], "LSTMDecoder"),
        "history": (head.get("history_type", "post"), "post"),
        "action space": (head.get("action_space", "continuous"), "continuous"),
        "vision resampler": (bool(original.get("use_vision_resampler")), False),
    }
    return ", ".join(f"{k} {got}" for k, (got, has) in wanted.items() if got != has)


def _structure(original: Mapping[str, Any]) -> StructureConfig:
    return StructureConfig(
        kind="policy_head",
        window=original.get("window_size", 1),
        chunk=original.get("fwd_pred_next_n", 1),
        latent=original.get("act_head", {}).get("latent", 1),
        cameras=("primary", "wrist") if original.get("use_hand_rgb") else ("primary",),
        text_len=1,
        act_insert="padded_column",
    )


def _head(original: Mapping[str, Any]) -> HeadConfig:
    head = original.get("act_head", {})
    return HeadConfig(
        kind="lstm",
        hidden=head.get("hidden_size", 1024),
        layers=head.get("num_layers", 4),
        down_sample=head.get("down_sample", "none"),
    )


def _config(structure: StructureConfig, head: HeadConfig) -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig("kosmos2", "", {}),
        structure=structure,
        head=head,
        action_dim=7,
        dropout=False,
        dtype="float32",
        remat="none",
    )


def _arch(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Architecture of a tiny model, read off its tensors."""
    text, vision = "backbone.text_model.model.", "backbone.vision_model.model."
    patch = params[vision + "embeddings.patch_embedding.weight"]
    side = round((len(params[vision + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vocab, width = params[text + "embed_tokens.weight"].shape

    def depth(prefix: str) -> int:
        return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in params if k.startswith(prefix))

    return kosmos2.arch(
        {
            "latent_query_num": len(params["backbone.image_to_text_projection.latent_query"]),
            "vision_config": {
                "hidden_size": patch.shape[0],
                "num_hidden_layers": depth(vision + "encoder.layers."),
                "num_attention_heads": HEADS,
                "intermediate_size": len(params[vision + "encoder.layers.0.mlp.fc1.bias"]),
                "patch_size": patch.shape[2],
                "image_size": side * patch.shape[2],
            },
            "text_config": {
                "vocab_size": vocab,
                "embed_dim": width,
                "layers": depth(text + "layers."),
                "attention_heads": HEADS,
                "ffn_dim": len(params[text + "layers.0.ffn.fc1.bias"]),
            },
        }
    )


def _load(mapped: Any, model: vla.VLA, theirs: Mapping[str, np.ndarray], part: str = "") -> Any:
    rows, ignore = mapped
    abstract = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items() if path.startswith(part)}
    found = {k: v.shape for k, v in theirs.items()}
    flat = maps.load(rows, shapes, found, theirs.__getitem__, lambda _, x: jnp.asarray(x), ignore)
    return unflatten(flat)


def _theirs(rows: list[weights.Weight], tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree.map(np.asarray, flatten(tree))
    named: dict[str, np.ndarray] = {}
    for row in rows:
        named.update(weights.to_theirs(row, flat))
    return named


def _image(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def _observation(images: dict[str, Any], text: np.ndarray, mask: np.ndarray) -> Observation:
    seen = {k: np.ones(v.shape[:2], bool) for k, v in images.items()}
    observation = Observation(images=images, image_mask=seen, text=text, text_mask=mask)
    return jax.tree.map(jnp.asarray, observation)


def _batch(
    io: Mapping[str, np.ndarray], prefix: str, config: ModelConfig
) -> tuple[Observation, Actions]:
    images = {"primary": _image(io[f"{prefix}/rgb"])}
    if "wrist" in config.structure.cameras:
        images["wrist"] = _image(io[f"{prefix}/hand_rgb"])
    text = io[f"{prefix}/text"].astype(np.int32)
    observation = _observation(images, text, io[f"{prefix}/text_mask"].astype(bool))
    chunk = io[f"{prefix}/action_chunck"].astype(np.float32)
    mask = io.get(f"{prefix}/chunck_mask", np.ones(chunk.shape[:3], bool)).astype(bool)
    return observation, Actions(chunk=jnp.asarray(chunk), mask=jnp.asarray(mask))
