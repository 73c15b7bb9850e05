"""Parity cases of openpi's transforms, prompts, images and whole input pipelines."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.data.language import sentencepiece
from vla_jax.data.language.fast_text import CLOSING, OPENING, FastText
from vla_jax.data.language.prompts import FORMS, state_bins
from vla_jax.data.units import aloha, relative
from vla_jax.data.units.fast import FastTokenizer, NotAChunkError
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.scaling import Scaling, pad
from vla_jax.models import letterbox
from vla_jax.models.image import ImageSpec, fit, preprocess

Arrays = Mapping[str, np.ndarray]
ROUNDING = 1e-12  # of float64
MASKS = {"aloha": (6, -1, 6, -1), "droid": (7, -1), "libero": (6, -1)}
HALF, BLACK = (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)
BOS, EOS = 2, 1
SEGMENTS = 128  # ids at the vocabulary's end that are no actions
# The pipelines' tokenizers are those of this folder.
TOKENIZERS = Path(__file__).parents[1] / "fixtures/openpi_tokenizer"


def transforms(folder: Path) -> Iterator[Row]:
    """Scaling, relative actions, ALOHA's joints."""
    io = golden.arrays(folder)
    statistics = golden.config(folder, "norm_stats.json")["norm_stats"]
    for name in ("zscore", "quantile"):
        for key in ("state", "actions"):
            units = Scaling.from_statistics(statistics[key], f"openpi_{name}")
            at, normalized = f"norm/{name}", units.normalize(io[f"norm/in/{key}_f64"])
            yield compare(f"{at}/{key}", normalized, io[f"{at}/{key}_f64"], ROUNDING)
            padded = io[f"{at}/padded_{key}_f64"]
            yield compare(f"{at}/padded_{key}", pad(normalized, padded.shape[-1]), padded, ROUNDING)
            inputs = padded if key == "state" else io[f"{at}/model_actions_f64"]
            back = units.unnormalize(inputs)
            yield compare(f"{at}/un_{key}", back, io[f"{at}/un_{key}_f64"], ROUNDING)
    actions, state = io["delta/actions_f64"], io["delta/state_f64"]
    for name, counts in MASKS.items():
        mask = relative.mask_of(*counts)
        normalized = relative.to_relative(actions, state, mask)
        yield compare(f"delta/{name}", normalized, io[f"delta/{name}_f64"], ROUNDING)
        back = relative.to_absolute(normalized, state, mask)
        yield compare(f"delta/{name}_back", back, io[f"delta/{name}_back_f64"], ROUNDING)
    normalized = aloha.encode_state(io["aloha/in/state_f64"])
    yield compare("aloha state", normalized, io["aloha/adapt1/state_f64"], ROUNDING)
    normalized = aloha.encode_actions(io["aloha/in/actions_f64"])
    yield compare("aloha actions", normalized, io["aloha/adapt1/actions_f64"], ROUNDING)
    normalized = aloha.decode_actions(io["aloha/adapt1/actions_f64"])
    yield compare("aloha actions back", normalized, io["aloha/adapt1/out_f64"], ROUNDING)


def images(folder: Path) -> Iterator[Row]:
    """Resizing with padding: Pillow's (openpi's client), jax's and torch's."""
    io = golden.arrays(folder)
    for i in sorted({int(name.split("/")[0]) for name in io if name[0].isdigit()}):
        pixels, (height, width) = io[f"{i}/in"], map(int, io[f"{i}/target"])
        # A grey level: before Pillow 13, which made these, rows always came first, as they do here;
        # and numbers that end on a half round either way, as the compiler has it.
        for name, resample in (("client_pil", "bilinear"), ("jax_uint8", "linear")):
            interpolated = fit(jnp.asarray(pixels), _spec(height, width, resample))
            yield compare(f"{i}/{name}", interpolated, io[f"{i}/{name}"], 1)
        h, x = pixels.shape[:2]
        inner = letterbox.shape_within(h, x, height, width)
        scaled = jnp.asarray(pixels).astype(jnp.float32) / 255.0 * 2.0 - 1.0
        for name, resample in (("jax_float", "linear"), ("torch_float", "linear_aliased")):
            if f"{i}/{name}" in io:
                interpolated = letterbox.interpolate(scaled, inner[0], inner[1], resample)
                interpolated = letterbox.paste(
                    interpolated, height, width, corner=False, background=-1.0
                )
                yield compare(f"{i}/{name}", interpolated, io[f"{i}/{name}"], 1e-6)


def openvla_images(folder: Path) -> Iterator[Row]:
    """OpenVLA's three ways to resize, then the statistics of both its towers."""
    io, config = golden.arrays(folder), golden.config(folder)
    means, deviations = config["means"], config["stds"]
    ways = {"resize-naive": "squash", "letterbox": "pad", "resize-crop": "crop"}
    for name in sorted(name for name in io if name.endswith("/uint8")):
        case, way, _ = name.split("/")
        pixels, expected = io[f"{case}/in"], io[name]
        specs = [
            ImageSpec(
                len(expected), tuple(mean), tuple(std), config["interpolation"], ways[way],
                crop_rounding="half_even", background=tuple(means[-1]),
            )
            for mean, std in zip(means, deviations, strict=True)
        ]  # fmt: skip
        yield compare(name, fit(jnp.asarray(pixels), specs[0]), expected, 0)
        channels = [
            np.moveaxis(np.asarray(preprocess(jnp.asarray(pixels), spec)), -1, 0) for spec in specs
        ]
        expected = io[f"{case}/{way}/pixel_values_corner"]
        corner = np.concatenate(channels)[:, : expected.shape[1], : expected.shape[2]]
        yield compare(f"{case}/{way}/pixel_values", corner, expected, 1e-6)


def tokenizer(folder: Path) -> Iterator[Row]:
    """Prompts of pi0, pi0.5 and pi0-FAST, answers in FAST tokens."""
    io, texts = golden.arrays(folder), json.loads((folder / "texts.json").read_text())
    text, fast = _tokenizers(folder)
    yield compare("state bins", state_bins(io["state"]), io["state_bins"], 0)
    for i, row in enumerate(texts):
        instruction, state = row["prompt"], io["state"][i]
        for form in ("pi0", "pi05"):
            written = FORMS[form].write(instruction, state)
            yield compare(f"{form}/{i} text", written != row[f"{form}_text"], False, 0)
            mask = io[f"{form}/{i}/mask"]
            yield _tokens(
                f"{form}/{i}", [BOS, *_ids(text, written)], io[f"{form}/{i}/tokens"], mask
            )
        prefix = [BOS, *_ids(text, FORMS["pi0fast"].write(instruction, state))]
        answer = fast.write(io["actions"][i])
        for case, parts in (("fast", (prefix, answer)), ("fast_infer", (prefix, []))):
            yield from _answer(f"{case}/{i}", io, *parts)
        content = fast.read(io[f"fast/{i}/emitted"], *io["actions"].shape[1:])
        yield compare(f"fast/{i} extracted", content, io[f"fast/{i}/extracted"], 1e-6)
    yield compare("garbage is refused", _refused(fast, io), True, 0)


def pipeline(folder: Path) -> Iterator[Row]:
    """Raw observations and training samples of named configs to model inputs, outputs back."""
    io, configs = golden.arrays(folder), golden.config(folder)
    text, fast = _tokenizers(TOKENIZERS)
    for name, config in configs.items():
        if "/" in name:
            continue
        units = _units(io, name, config)
        for case in ("infer", "train"):
            at = f"{name}/{case}"
            recorded = _recorded(io, f"{at}/in")
            state = units.prepare_state(recorded["state"])
            expected = io[f"{at}/out/state_f64"]
            yield compare(f"{at} state", pad(state, expected.shape[-1]), expected, ROUNDING)
            result = np.empty(0)
            if "actions" in recorded:
                result = units.prepare_actions(recorded["actions"], recorded["state"])
                expected = io[f"{at}/out/actions_f64"]
                yield compare(f"{at} actions", pad(result, expected.shape[-1]), expected, ROUNDING)
            yield from _pictures(io, at, config)
            tokens, mask = (io[f"{at}/out/tokenized_prompt{s}"] for s in ("", "_mask"))
            form = _form(name, config)
            message = configs.get(f"{at}/prompt") or _default_prompt(text, form, tokens[mask])
            ids = [BOS, *_ids(text, FORMS[form].write(message, state))]
            if form == "pi0fast" and "actions" in recorded:
                ids += fast.write(result)
            yield _tokens(f"{at} tokens", ids, tokens, mask)
        output = io[f"{name}/model_output"]
        if form == "pi0fast":
            output = fast.read(output.astype(int), config["action_horizon"], config["action_dim"])
        result = units.restore(
            np.asarray(output, np.float64), _recorded(io, f"{name}/infer/in")["state"]
        )
        # The original's outputs have gone through float32 where the model's have.
        yield compare(f"{name} robot", result, io[f"{name}/robot_actions_f64"], 1e-6)


def _spec(height: int, width: int, resample: str) -> ImageSpec:
    return ImageSpec(height, HALF, HALF, resample, "letterbox", background=BLACK, width=width)


def _tokenizers(folder: Path) -> tuple[Any, FastText]:
    text = sentencepiece.read(folder / "tiny_tokenizer.model")
    raw = golden.config(folder)["fast"]
    vocabulary = (folder / "fast_tokenizer.json").read_text(encoding="utf-8")
    opening, closing = (tuple(_ids(text, part)) for part in (OPENING, CLOSING))
    fast = FastTokenizer.from_json(raw | {"tokenizer": vocabulary})
    return text, FastText(fast, text.get_vocab_size() - SEGMENTS, opening, closing, EOS)


def _ids(text: Any, said: str) -> list[int]:
    return text.encode(said, add_special_tokens=False).ids


def _tokens(name: str, ids: list[int], expected: np.ndarray, mask: np.ndarray) -> Row:
    """Padded ids; the original cuts what is too long, ours refuses it."""
    ids = ids[: len(expected)]
    same = np.array_equal(ids, expected[mask.astype(bool)]) and mask[: len(ids)].all()
    return compare(name, not same, False, 0)


def _answer(name: str, io: Arrays, prefix: list[int], answer: list[int]) -> Iterator[Row]:
    yield _tokens(name, prefix + answer, io[f"{name}/tokens"], io[f"{name}/mask"])
    written = np.zeros(len(io[f"{name}/tokens"]), int)
    written[len(prefix) : len(prefix) + len(answer)] = 1
    for key in ("ar_mask", "loss_mask"):
        yield compare(f"{name} {key}", written, io[f"{name}/{key}"], 0)


def _refused(fast: FastText, io: Arrays) -> bool:
    try:
        fast.read(io["fast/garbage"], *io["actions"].shape[1:])
    except NotAChunkError:
        return True
    return False


def _units(io: Arrays, name: str, config: Mapping[str, Any]) -> PolicyUnits:
    robot = next(robot for robot in MASKS if robot in name)
    rule = "openpi_quantile" if config["quantiles"] else "openpi_zscore"
    state, actions = (
        Scaling.from_statistics(
            {k: io[f"{name}/norm/{part}/{k}_f64"] for k in ("mean", "std", "q01", "q99")}, rule
        )
        for part in ("state", "actions")
    )
    shifted = "DeltaActions" in config["inputs"]
    return PolicyUnits(
        state,
        actions,
        dim=len(actions.first),
        relative=relative.mask_of(*MASKS[robot]) if shifted else (),
        robot="aloha" if robot == "aloha" else "",
    )


def _recorded(io: Arrays, at: str) -> dict[str, np.ndarray]:
    """State and actions of a raw sample, under whatever name its robot has for them."""
    results = {
        k.removeprefix(at + "/").split("/")[-1]: v for k, v in io.items() if k.startswith(at)
    }
    short = {k.removesuffix("_f64").split(".")[-1].split("|")[-1]: v for k, v in results.items()}
    if "joint_position" in short:
        short["state"] = np.append(short["joint_position"], short["gripper_position"])
    if "action" in short:
        short["actions"] = short["action"]
    return short


def _pictures(io: Arrays, at: str, config: Mapping[str, Any]) -> Iterator[Row]:
    recorded = _recorded(io, f"{at}/in")
    names = {
        "base_0_rgb": ("image", "exterior_image_1_left", "cam_high", "top"),
        "left_wrist_0_rgb": ("wrist_image", "wrist_image_left", "cam_left_wrist"),
    }
    for camera, sources in names.items():
        pixels = next((recorded[name] for name in sources if name in recorded), None)
        observed = bool(io[f"{at}/out/image_mask|{camera}"])
        yield compare(
            f"{at} {camera} is seen", pixels is not None or _all_seen(config), observed, 0
        )
        if pixels is None:
            continue
        if pixels.dtype != np.uint8:
            pixels = (255 * pixels).astype(np.uint8)
        pixels = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == 3 else pixels
        array = np.asarray(fit(jnp.asarray(pixels), _spec(224, 224, "bilinear")))
        crc = zlib.crc32(array.tobytes())
        yield compare(f"{at} {camera}", crc, io[f"{at}/out/image|{camera}/crc32"], 0)


def _all_seen(config: Mapping[str, Any]) -> bool:
    return config["model"] == "Pi0FASTConfig"


def _form(name: str, config: Mapping[str, Any]) -> str:
    if config["model"] == "Pi0FASTConfig":
        return "pi0fast"
    # pi05_libero does without its state.
    return "pi05" if name.startswith("pi05") and name != "pi05_libero" else "pi0"


def _default_prompt(text: Any, form: str, ids: np.ndarray) -> str:
    """What a config says where a sample has no instruction; its text is not in the folder."""
    message = text.decode(ids[1:].tolist(), skip_special_tokens=False)
    return message.split("Task: ")[-1].split(", State:")[0].rstrip("\n")
