"""Parity of the data side: windows and masks, collated batches, normalisation, shifts, prompts."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.data import sampler
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.losses import NO_LABEL
from vla_jax.train.augment import move

# The original normalises in float32, ours in float64 before it rounds; values are in [-1, 1].
ROUNDING = 5e-7
Arrays = Mapping[str, np.ndarray]
# RoboVLMs' `norm_action` of every shipped config.
SPEC = ActionSpec(7, "none", 0.65, (-1.0,) * 6, (1.0,) * 6, (-1.0, 1.0))
# Key of its text functions -> backbone
PROMPTS = {
    "flamingo": "flamingo", "llava": "llava", "qwen": "qwen_vl", "kosmos": "kosmos2",
    "moondream": "moondream", "uform": "uform", "paligemma": "paligemma",
}  # fmt: skip


def find(folder: Path) -> Callable[[Path], Iterator[Row]] | None:
    """What runs the data side of a folder, by the arrays it holds."""
    if not (folder / "io.npz").is_file():
        return None
    names = np.load(folder / "io.npz").files
    if "in0/actions" in names and any(n.endswith("/action_chunck") for n in names):
        return collater
    if any(n.endswith("/in0/action") for n in names):
        return transform
    if any(n.startswith("chunked_episode_") for n in names):
        return utilities
    return None


def collater(folder: Path) -> Iterator[Row]:
    """RoboVLMs' CALVIN collater: samples of window + chunk frames, padded on the right."""
    io, meta = golden.arrays(folder), golden.config(folder, "meta.json")
    window, chunk = meta["window"], meta["chunk"]
    samples = sorted({k.split("/")[0] for k in io if k.startswith("in")})
    for out in sorted({k.split("/")[0] for k in io if not k.startswith("in")}):
        expected = _under(io, out)
        rows = [_Sample(io[f"{s}/actions"], io[f"{s}/mask"] > 0, window, chunk) for s in samples]
        yield from _actions(out, rows, expected, io_gripper=_from_signs)
        for camera, key in (("rgb", "rgb"), ("hand", "hand_rgb")):
            pixels = np.stack([io[f"{s}/{camera}"] for s in samples])
            frames = np.stack([row.history for row in rows])
            observed = np.take_along_axis(pixels, frames[:, :, None, None, None], 1)
            yield compare(f"{out} {key}", observed, expected[key], 0.0)
            name = f"fwd_{key}_chunck"
            if name in expected:
                yield _future(f"{out} {name}", rows, pixels, expected[name], expected["fwd_mask"])
        yield from _labels(out, rows, expected, signs=True)


def transform(folder: Path) -> Iterator[Row]:
    """RoboVLMs' transform of OXE samples: sliding ("interleave") and segment windows."""
    io, meta = golden.arrays(folder), golden.config(folder, "meta.json")
    window, chunk = meta["window"], meta["chunk"]
    for case in sorted({k.split("/")[0] for k in io}):
        inputs, expected = _under(io, case), _under(io, f"{case}/out")
        samples = sorted({k.split("/")[0] for k in inputs if k.startswith("in")})
        rows = [_Sample(inputs[f"{s}/action"], inputs[f"{s}/mask"], window, chunk) for s in samples]
        yield from _actions(case, rows, expected, io_gripper=lambda g: (g == 1).astype(g.dtype))
        pixels = np.stack([inputs[f"{s}/images"] for s in samples])
        pixels = np.moveaxis(pixels.astype(np.float64) / 255, -1, 2)
        # Hidden steps keep their images there, so only what is seen can be compared.
        frames, observed = np.stack([r.history for r in rows]), np.stack([r.seen for r in rows])
        ours = np.take_along_axis(pixels, frames[:, :, None, None, None], 1)
        reference = expected["rgb"][:, :window]
        ours, observed = ours[:, -reference.shape[1] :], observed[:, -reference.shape[1] :]
        yield compare(f"{case} rgb", ours[observed], reference[observed], ROUNDING)
        if "fwd_rgb_chunck" in expected:
            yield _future(
                f"{case} fwd_rgb_chunck", rows, pixels, expected["fwd_rgb_chunck"],
                expected["fwd_mask"],
            )  # fmt: skip
        yield from _labels(case, rows, expected, signs=False)


def _under(io: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) + 1 :]: v for k, v in io.items() if k.startswith(prefix + "/")}


class _Sample:
    """One sample of the original as ours: a trajectory, its window, what is hidden of it."""

    def __init__(self, actions: np.ndarray, mask: np.ndarray, window: int, chunk: int):
        self.actions, self.window, self.chunk = actions, window, chunk
        self.hidden = int(np.argmax(mask))
        self.length = int(np.flatnonzero(mask)[-1]) + 1
        place = np.array([window - 1]), np.array([self.length])
        self.frames, self.mask = (
            x[0] for x in sampler.chunks(*place, window, chunk, self.hidden, padded_rows=True)
        )
        self.strict = sampler.chunks(*place, window, chunk, self.hidden)[1][0]
        self.future, self.future_mask = (
            sampler.unfold(x[:, 1:], chunk)[0]
            for x in sampler.spans(*place, window, chunk, self.hidden)
        )
        self.history, self.seen = (x[0] for x in sampler.history(place[0], window, self.hidden))


def _actions(
    case: str, rows: list[_Sample], expected: Arrays, io_gripper: Callable[[np.ndarray], Any]
) -> Iterator[Row]:
    mask = np.stack([row.mask for row in rows])
    yield compare(f"{case} chunck_mask", mask, expected["chunck_mask"], 0.0)
    strict = np.stack([row.strict for row in rows])
    observed = np.stack([row.seen for row in rows])[:, :, None]
    reference = expected["chunck_mask"].astype(bool) & observed
    yield compare(f"{case} chunck_mask of steps that are seen", strict, reference, 0.0)
    actions = np.stack([row.actions for row in rows])
    actions = np.concatenate([actions[..., :-1], io_gripper(actions[..., -1:])], -1)
    flat = SPEC.normalize(actions)[:, :-1]
    yield compare(f"{case} action", flat, expected["action"], ROUNDING)
    chunk = rows[0].chunk
    unfolded = sampler.unfold(flat, chunk)
    yield compare(f"{case} action_chunck", unfolded, expected["action_chunck"], ROUNDING)
    counted = np.stack([SPEC.normalize(a)[r.frames] for a, r in zip(actions, rows, strict=True)])
    name = f"{case} action_chunck by our frames"
    yield compare(name, counted[mask], expected["action_chunck"][mask], ROUNDING)
    if "action_mask" in expected:
        # The table of frames without the last column is what is unfolded to the chunks.
        yield compare(f"{case} action_mask", _fold(mask), expected["action_mask"], 0.0)


def _fold(chunks: np.ndarray) -> np.ndarray:
    """Inverse of `unfold`."""
    return np.concatenate([chunks[:, :, 0], chunks[:, -1, 1:]], axis=1)


def _from_signs(gripper: np.ndarray) -> np.ndarray:
    return np.floor((gripper + 1) / 2)


def _future(
    name: str, rows: list[_Sample], pixels: np.ndarray, images: np.ndarray, mask: np.ndarray
) -> Row:
    """Images after every step; an infinite error where the masks differ."""
    counted = np.stack([row.future_mask for row in rows])
    if not np.array_equal(counted, mask.astype(bool)):
        return Row(f"{name}: fwd_mask differs", np.inf, 0.0, 1.0)
    ours = np.stack([x[r.future] for x, r in zip(pixels, rows, strict=True)])
    return compare(f"{name}, fwd_mask", ours[counted], images[counted], ROUNDING)


def _labels(case: str, rows: list[_Sample], expected: Arrays, signs: bool) -> Iterator[Row]:
    """Ids of the actions that are supervised, in order, up to the vocabulary's offset."""
    labels = expected.get("instr_and_action_labels")
    if labels is None or labels.ndim != 3 or not (labels == NO_LABEL).any():
        return
    tokenizer = ActionTokenizer(0)
    ours, reference = [], []
    for b, row in enumerate(rows):
        actions = SPEC.normalize(row.actions)
        gripper = row.actions[:, -1:]
        actions[:, -1:] = gripper if signs else np.where(gripper == 1, 1.0, -1.0)
        for w in range(row.window):
            ids = tokenizer.encode(actions[row.frames[w]][row.mask[w]]).reshape(-1)
            message = labels[b, w][labels[b, w] != NO_LABEL]
            ours.append(ids)
            reference.append(message[: len(ids)])
            # What else is told is the stop token, if anything.
            if not len(ids) <= len(message) <= len(ids) + 1:
                yield Row(f"{case} labels [{b}, {w}]: {len(message)} ids", np.inf, 0.0, 1.0)
    offset = np.concatenate(reference) - np.concatenate(ours)
    yield compare(f"{case} action labels", offset - np.median(offset), 0 * offset, 0.0)


def utilities(folder: Path) -> Iterator[Row]:
    """The functions RoboVLMs' datasets are made of."""
    io = golden.arrays(folder)
    for name in sorted(k for k in io if k.startswith("chunked_episode_") and k.endswith("_idx")):
        yield from _table(io, name.removesuffix("_idx"))
    chunk = io["generate_chunck_data"].shape[2]
    flat = io["chunk_in"]
    for name, part in (("generate", flat[:, :-1]), ("train_utils_generate", flat[:, 1:])):
        key = f"{name}_chunck_data"
        yield compare(key, sampler.unfold(part, chunk), io[key], 0.0)
    for key in sorted(k for k in io if k.startswith("get_tensor_chunk_")):
        inputs = io["gtc_mask_in" if "mask" in key else "gtc_in"][None]
        size = int(key.rsplit("_", 1)[1])
        yield compare(key, sampler.unfold(inputs, size)[0], io[key], 0.0)
    for key in ("A", "A4"):
        for name, function in (("normalize", SPEC.normalize), ("unnormalize", SPEC.unnormalize)):
            yield compare(f"{name} {key}", function(io[key]), io[f"{name}_{key}_ml1"], ROUNDING)
    yield from _shifts(io)
    yield from _prompts(json.loads((folder / "text_and_notes.json").read_text()))


def _table(io: Arrays, name: str) -> Iterator[Row]:
    """Frames and masks of every window of one trajectory."""
    mode, left_pad = name.split("_")[2:4]
    index, mask = io[f"{name}_idx"], io[f"{name}_mask"]
    first, last = int(index.min()), int(index.max())
    length = np.array([last - first + 1])
    # With left padding the first window ends at the first frame.
    window = int(np.argmax(io["chunked_episode_sliding_1_mask"][0])) + 1
    windows = sampler.Windows(length, window, left_pad == "1", mode == "range")
    place = windows.locate(np.arange(len(windows)))
    frames, counted = sampler.spans(
        place.end, length[place.trajectory], window, index.shape[1] - window, place.hidden
    )
    yield compare(f"{name}: frames", frames + first, index, 0.0)
    yield compare(f"{name}: mask", counted, mask, 0.0)


def _shifts(io: Arrays) -> Iterator[Row]:
    """A shift by whole pixels; the original interpolates to within float32."""
    for name, images, draw in (
        ("RandomShiftsAug", io["shift_img"], io["shift_draw"]),
        ("forward_traj", io["traj_img"][0], io["traj_draw"]),
    ):
        x = jnp.asarray(np.moveaxis(images, 1, -1))
        offsets = draw.reshape(-1, 2)[:, ::-1]  # the original's are (columns, rows)
        expected = io[name].reshape(images.shape)
        errors = []
        for pad in range(1, images.shape[-1] // 2):  # which pad it was is not recorded
            shift = functools.partial(move, reach=pad)
            moved = jax.vmap(shift)(x, jnp.asarray(offsets - pad, jnp.int32))
            errors.append(np.abs(np.moveaxis(np.asarray(moved), -1, 1) - expected).max())
        yield Row(f"{name}, pad {1 + int(np.argmin(errors))}", float(min(errors)), 2e-5, 1.0)


def _prompts(notes: Mapping[str, Any]) -> Iterator[Row]:
    """Prompts, but for how a tokenizer spells its end of text."""
    ends = re.compile(r"</s>|<eos>|<\|endoftext\|>")
    (instruction,) = notes["text_function"]["qwen"]["strings"]  # nothing around it
    for key, backbone in PROMPTS.items():
        (message,) = notes["text_function"][key]["strings"]
        ours = BACKBONES[backbone].PROMPT.format(instruction=instruction)
        same = ends.sub("*", ours) == ends.sub("*", message)
        yield compare(f"prompt of {key}" + ("" if same else f": {message!r}"), not same, False, 0.0)
