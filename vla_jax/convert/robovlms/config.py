"""RoboVLMs' JSON training configs in our terms; `robovlms_keys` says what becomes of each key."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_jax.config import ConfigError, read_json
from vla_jax.convert.robovlms import keys
from vla_jax.data.oxe import get_mixture
from vla_jax.data.oxe.folders import find_folder
from vla_jax.models.structures import STRUCTURES

# Their class -> our backbone, the size of the images it takes where `image_size` sets it.
BACKBONES: dict[str, tuple[str, int | None]] = {
    "RoboKosMos": ("kosmos2", 224),
    "RoboPaligemma": ("paligemma", None),
    # Its word embedding is MPT's `transformer.wte`; with Vicuna it needs a class of one's own.
    "RoboLLaVA": ("llava_mpt", 224),
    "RoboLLaVAVicuna": ("llava", 336),
    "RoboQwen": ("qwen_vl", None),
    "RoboMoonDream": ("moondream", None),
    "RoboUform": ("uform", None),
    "RoboFlamingo": ("flamingo", 224),
}
# Their class -> (what the name of the VLM's folder has in it, our backbone for that one).
VARIANTS = {"RoboPaligemma": (r"paligemma-?2(?!\d)", "paligemma2")}
# Their class -> our head, its layers by default.
HEADS = {
    "LSTMDecoder": ("lstm", 4),
    "FCDecoder": ("mlp", 2),
    "GPTDecoder": ("gpt2", 8),
    "DiscreteDecoder": ("detokenizer", 1),
}
FLAMINGO = "RoboFlamingo"
# Its `vlm.name`, less `_ift` (fine-tuned on instructions) -> model_type of the language model.
FLAMINGOS = {"mpt_1b": "mosaic_gpt", "mpt_3b": "gpt_neox", "mpt_7b": "mpt", "llama_7b": "llama"}
# Their `history_type` -> our structure.
HISTORIES = {kind.robovlms_name: name for name, kind in STRUCTURES.items() if kind.robovlms_name}
SCHEDULES = {"constant": "constant", "cosine": "cosine", "half-cosine": "half_cosine"}
DTYPES = {"16": "bfloat16", "bf16": "bfloat16", "32": "float32"}

CALVIN, OXE, TEXTS = "DiskCalvinDataset", "OpenVLADataset", "VideoLLaVADataset"


def read(path: str | Path) -> dict[str, Any]:
    """A JSON config with its parents merged under it.

    `parent` names another file, from this one's folder or the working directory. Groups are
    merged key by key, unless the child's says `"__override__": true`.

    Raises:
        ConfigError: a file is missing, no JSON object, or its own ancestor.
    """
    return _read(Path(path), ())


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ConfigError(f"{path}: is its own parent")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    child = read_json(path)
    if not child.get("parent"):
        return child
    parent = Path(child["parent"])
    # RoboVLMs reads a parent relative to its working folder; ours need not run there.
    beside = path.parent / parent
    place = beside if beside.is_file() else parent
    return merge(_read(place, (*children, path.resolve())), child)


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """The child's values over the parent's."""
    merged = dict(parent)
    for key, value in child.items():
        if isinstance(value, Mapping):
            under = {} if value.get("__override__") else merged.get(key)
            value = {k: v for k, v in value.items() if k != "__override__"}
            merged[key] = merge(under if isinstance(under, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def to_raw(original: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """A merged JSON config -> our raw config.

    Args:
        original: of `read`.
        base: ours with its defaults, from which all else is taken.

    Raises:
        ConfigError: listing every key that is missing or asks for what cannot be done.
    """
    raw, problems = start(original, base)
    problems += keys.refusals(original)
    size, asked = BACKBONES.get(original["robovlm_name"], ("", None))[1], original.get("image_size")
    if size and asked not in (size, None):
        problems.append(f"image_size: {asked} cannot be done: the image tower takes {size}")
    _cotrain(original, raw, problems)
    _steps(original, raw)
    _optim(original, raw, problems)
    return finish(raw, problems)


def start(original: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our raw config with the model and the data of theirs, and what is wrong so far.

    Raises:
        ConfigError: naming the keys without which there is no model.
    """
    needed = ("robovlm_name", "act_head", "window_size", "fwd_pred_next_n", "train_dataset")
    missing = [key for key in needed if not original.get(key)]
    if missing:
        raise ConfigError(f"no config of RoboVLMs' policies: {missing} missing or empty")
    raw: dict[str, Any] = copy.deepcopy(dict(base))
    problems: list[str] = []
    _model(original, raw, problems)
    _data(original, raw, problems)
    return raw, problems


def finish(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The raw config, if nothing is wrong with it.

    Raises:
        ConfigError: listing the problems.
    """
    if problems:
        listing = "\n  ".join(problems)
        raise ConfigError(f"{len(problems)} problem(s) in RoboVLMs' config:\n  {listing}")
    return raw


def _pick(table: Mapping[str, Any], value: Any, path: str, problems: list[str]) -> Any:
    if value not in table:
        problems.append(f"{path}: {value!r} is none of {sorted(table)}")
        return next(iter(table.values()))
    return table[value]


def _put(
    group: dict[str, Any], key: str, value: Any, off: Any, path: str, problems: list[str]
) -> None:
    """Set a key of ours; where the config lacks it, only `off` can be done."""
    if key in group:
        group[key] = value
    elif value != off:
        problems.append(f"{path}: {value!r} cannot be done: no counterpart here")


def _model(original: Mapping[str, Any], raw: dict[str, Any], problems: list[str]) -> None:
    head, model = original["act_head"], raw["model"]
    name, _ = _pick(BACKBONES, original["robovlm_name"], "robovlm_name", problems)
    folder = original.get("vlm", {}).get("pretrained_model_name_or_path", "")
    pattern, variant = VARIANTS.get(original["robovlm_name"], ("", ""))
    # One class of theirs serves several models, which only the folder's name tells apart.
    if variant and re.search(pattern, folder):
        name = variant
    model["backbone"].update(name=name, hf_dir=folder)
    flamingo = original["robovlm_name"] == FLAMINGO
    if flamingo:
        which = str(original.get("vlm", {}).get("name", "mpt_1b")).removesuffix("_ift")
        kind, arch = _pick(FLAMINGOS, which, "vlm.name", problems), model["backbone"]["arch"]
        arch["text_config"] = {"model_type": kind, **arch.get("text_config", {})}
    precision = str(original.get("trainer", {}).get("precision", "32")).split("-")[0]
    model["dtype"] = _pick(DTYPES, precision, "trainer.precision", problems)
    kind, layers = _pick(HEADS, head.get("type"), "act_head.type", problems)
    model["action_dim"] = head.get("action_dim", 7)
    model["head"].update(
        kind=kind,
        layers=head.get("num_layers", layers),
        hidden=head.get("hidden_size", 1024),
        down_sample=head.get("down_sample", "none"),
    )
    if kind == "detokenizer":
        for foreign, ours, default in (
            ("n_bin", "bins", 256), ("min_action", "low", -1.0), ("max_action", "high", 1.0)
        ):  # fmt: skip
            # JSON may say 1 where our option is a float.
            value = type(default)(head.get(foreign, default))
            _put(model["head"], ours, value, None, f"act_head.{foreign}", problems)
    space = head.get("action_space", "continuous")
    structure = _pick(
        HISTORIES, head.get("history_type", "post"), "act_head.history_type", problems
    )
    if kind == "mlp" and original["window_size"] == 1:
        structure = "one_step"
    model["structure"].update(
        kind="discrete" if space == "discrete" else structure,
        window=original["window_size"],
        chunk=original["fwd_pred_next_n"],
        latent=head.get("latent", 1),
        cameras=("primary", "wrist") if _has_wrist(original) else ("primary",),
    )
    # The original's resampler makes 64 tokens, whatever its config block says.
    tokens = 64 if original.get("use_vision_resampler") else 0
    _put(model["structure"], "resampler", tokens, 0, "use_vision_resampler", problems)
    source = "text" if flamingo else head.get("token_source", "all")
    readout = source if space == "down_sample" else "action"
    _put(model["structure"], "readout", readout, "action", "act_head.action_space", problems)
    if original.get("use_clip_norm"):
        weight = float(original.get("clip_norm_ratio", 0.05))
        sentence = {**model.get("sentence", {}), "dim": 768, "weight": weight}
        _put(model, "sentence", sentence, None, "use_clip_norm", problems)


def _datasets(original: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    data = original["train_dataset"]
    return data if isinstance(data, list) else [data]


def _has_wrist(original: Mapping[str, Any]) -> bool:
    """The original's OXE reader has no hand camera, whatever `use_hand_rgb` says."""
    calvin = any(part.get("type") == CALVIN for part in _datasets(original))
    return bool(original.get("use_hand_rgb")) and calvin


def _data(original: Mapping[str, Any], raw: dict[str, Any], problems: list[str]) -> None:
    data, parts = raw["data"], _datasets(original)
    low, high = original.get("norm_min", -1), original.get("norm_max", 1)
    if original.get("norm_action") and low != -high:
        problems.append(f"norm_min, norm_max: {low}, {high} cannot be done: clipping is symmetric")
    data["clip"] = float(high) if original.get("norm_action") else 1.0
    actions = [part for part in parts if part.get("type") in (CALVIN, OXE)]
    texts = [part for part in parts if part.get("type") == TEXTS]
    kinds = (CALVIN, OXE, TEXTS)
    problems += [
        f"train_dataset.type: {part.get('type')!r} is none of {list(kinds)}"
        for part in parts
        if part.get("type") not in kinds
    ]
    if len(actions) != 1 or len(texts) > 1:
        problems.append(
            f"train_dataset: {len(actions)} sets of actions and {len(texts)} of texts cannot be "
            "done: one of actions (a data_mix holds several datasets) and at most one of texts"
        )
        return
    part = actions[0]
    # `organize_type` decides both, whatever left_pad and window_sample say.
    modes = {"interleave": False, "segment": True}
    mode, path = part.get("organize_type", "interleave"), "train_dataset.organize_type"
    segment = bool(_pick(modes, mode, path, problems))
    windows = "segment" if segment else "sliding"
    data["parity"].update(left_pad=segment, padded_rows=segment, windows=windows)
    if part["type"] == CALVIN:
        folder = part.get("data_dir", "")
        data["datasets"] = ({"spec": "calvin", "dir": folder, "weight": 1.0},)
        data.update(normalization="none")
        pads = {"primary": part.get("rgb_pad", -1), "wrist": part.get("gripper_pad", -1)}
        cameras = raw["model"]["structure"]["cameras"]
        shift = {camera: pads[camera] for camera in cameras if pads[camera] > 0}
        raw["augment"].update(shift=shift, per_frame=True)
    else:
        try:  # like the original, without datasets whose actions are not a hand's
            mix = get_mixture(str(part.get("data_mix")), action="eef_pos")
        except KeyError as error:
            problems.append(f"train_dataset.data_mix: {error.args[0]}")
            return
        root = part.get("data_root_dir", "")
        data["datasets"] = tuple(
            {"spec": n, "dir": str(find_folder(root, n) or f"{root}/{n}"), "weight": weight}
            for n, weight in mix.items()
        )
        data["normalization"] = "q99"
        if part.get("image_aug"):
            raw["augment"].update(
                crop_scale=0.9, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05
            )


def _cotrain(original: Mapping[str, Any], raw: dict[str, Any], problems: list[str]) -> None:
    kinds = [part.get("type") for part in _datasets(original)]
    if TEXTS not in kinds or len(kinds) != 2:
        return
    place = kinds.index(TEXTS)
    part = _datasets(original)[place]
    paths = part.get("data_paths", [])
    if len(paths) != 1:
        problems.append(f"train_dataset.data_paths: {paths} cannot be done: one file of texts")
        return
    weights = original.get("train_weights") or [1.0, 1.0]
    ratio = weights[place] / weights[1 - place]
    # The original draws one kind of batch a step; here every step holds both, in that ratio.
    rows = max(1, round(_batch(original) * ratio))
    raw["data"]["cotrain"].update(path=paths[0], images=part.get("image_folder", ""), rows=rows)


def _batch(original: Mapping[str, Any]) -> int:
    """Windows an optimizer step."""
    size = original.get("batch_size", 1)
    size = size[0] if isinstance(size, list) else size
    devices = original.get("gpus", 1) * original.get("num_nodes", 1)
    return size * devices * (original.get("trainer", {}).get("accumulate_grad_batches") or 1)


def _steps(original: Mapping[str, Any], raw: dict[str, Any]) -> None:
    trainer, train, optim = original.get("trainer", {}), raw["train"], raw["optim"]
    raw["seed"] = original.get("seed", raw["seed"])
    train["batch_size"] = _batch(original)
    train["accumulate"] = trainer.get("accumulate_grad_batches") or 1
    epochs, steps = float(trainer.get("max_epochs", 1)), trainer.get("max_steps", -1)
    warmup = float(original.get("warmup_epochs") or 0)
    optim["warmup_steps"] = original.get("warmup_steps") or 0
    if steps > 0:  # an epoch is then a share of the steps
        train.update(steps=steps, epochs=0.0)
        optim["warmup_steps"] += round(warmup * steps / epochs)
    else:
        train["epochs"] = epochs
        optim["warmup_epochs"] = warmup
    check_interval = trainer.get("check_val_every_n_epoch")
    train["check_epochs"] = float(check_interval) if check_interval and steps <= 0 else 0.0
    if trainer.get("val_check_interval"):
        train.update(eval_every=trainer["val_check_interval"])
        train.update(save_every=trainer["val_check_interval"])
    if trainer.get("limit_val_batches"):
        train["eval_batches"] = trainer["limit_val_batches"]
    train["log_every"] = trainer.get("log_every_n_steps", train["log_every"])
    train["tensorboard"] = "tensorboard" in (trainer.get("logger") or ())


def _optim(original: Mapping[str, Any], raw: dict[str, Any], problems: list[str]) -> None:
    optim, setup = raw["optim"], original.get("train_setup", {})
    schedule = original.get("scheduler", "constant")
    optim.update(
        learning_rate=float(original.get("learning_rate", optim["learning_rate"])),
        min_scale=float(original.get("min_lr_scale", 0.01)),
        weight_decay=float(original.get("weight_decay", 0)),
        schedule=_pick(SCHEDULES, schedule, "scheduler", problems),
        clip_norm=float(original.get("gradient_clip_val", 0)),
        gripper_weight=float(original.get("arm_gripper_loss_ratio", optim["gripper_weight"])),
    )
    discrete = original["act_head"].get("action_space") == "discrete"
    ratio = float(original.get("vl_cotrain_ratio", 0.05))
    optim["caption_weight"] = ratio * (10.0 if discrete else 1.0)
    frozen, trained = what_trains(original["robovlm_name"], setup)
    optim.update(frozen=frozen, trained=trained)
    if setup.get("lora_enable"):
        raw["lora"].update(
            rank=setup.get("lora_r", 64),
            alpha=float(setup.get("lora_alpha", 16)),
            dropout=float(setup.get("lora_dropout", 0.05)),
            # Every linear map of the VLM; the patch embedding is a convolution there.
            targets=(r"^backbone/(?!.*patch/).*/kernel$",),
        )


def what_trains(
    name: str, setup: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    """`train_setup` as `optim.frozen` and `optim.trained`.

    Args:
        name: `robovlm_name`.
        setup: the group `train_setup`.
    """
    backbone, vision, embedding = "^backbone/", "^backbone/vision", "^backbone/text/embedding$"
    layers, last = "^backbone/text/layers/", setup.get("train_decoder_layers", -1)
    train_vision = bool(setup.get("train_vision"))
    words = bool(setup.get("train_text_embedding"))
    frozen: list[str] = []
    trained: list[tuple[str, int]] = []
    if name == FLAMINGO:  # all frozen but what is named
        frozen = [backbone, "^resampler/", "^action_token$"]
        chosen = {
            vision: train_vision,
            "^backbone/text/": setup.get("train_full_decoder"),
            "^backbone/resampler/": setup.get("train_resampler"),
            embedding: words,
        }
        trained = [(path, -1) for path, on in chosen.items() if on]
        if last:  # of the layers that attend to images
            trained.append(("^backbone/text/layers/extra/", last))
        return tuple(frozen), tuple(trained)
    if setup.get("freeze_resampler"):
        frozen.append("^resampler/")
    if name.startswith("RoboLLaVA"):  # the tower runs without gradients
        train_vision = False
    (trained.append((vision, -1)) if train_vision else frozen.append(vision))
    (trained.append((embedding, -1)) if words else frozen.append(embedding))
    # Of these two only the language model is what the flag freezes.
    outside = name in ("RoboMoonDream", "RoboUform")
    lora, still = bool(setup.get("lora_enable")), bool(setup.get("freeze_backbone"))
    if lora or still or last >= 0:
        if lora:
            trained = [rule for rule in trained if rule[0] != vision]
        elif not still and last > 0:
            trained.append((layers, last))
        frozen.append("^backbone/text/" if outside else backbone)
        return tuple(frozen), tuple(trained)
    return tuple(frozen), ()
