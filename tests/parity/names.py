"""Full-size checkpoints by name and shape: each consumed exactly once, and written again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.parity import original
from tests.parity.table import Row, compare
from vla_jax.convert import maps
from vla_jax.convert.tensors import renamed
from vla_jax.models import vla, weights
from vla_jax.models.backbones import BACKBONES
from vla_jax.rules import flatten

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Full:
    """What a folder's `full_param_names*.txt` are the names of.

    Attributes:
        backbone: of ours.
        arch: where it is not the released architecture.
        whole: a RoboVLMs checkpoint (LSTM head, one action token), not the VLM alone.
        file: of the folder, if it has several models.
    """

    backbone: str
    arch: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    file: str = ""


# folder -> its models
FULL: dict[str, tuple[Full, ...]] = {
    "hf_kosmos2": (Full("kosmos2"),),
    "hf_llava_llama": (Full("llava"),),
    "llava_original_7b": (Full("llava", {"text_config": {"vocab_size": 32000}}),),
    "llava_original_mpt7b": (Full("llava_mpt", {"vision_config": {"image_size": 336}}),),
    "robokosmos_full_calvin_ws8": (Full("kosmos2", whole=True),),
    "robokosmos_full_hand_ws16": (Full("kosmos2", whole=True),),
}


def run(folder: Path) -> Iterator[Row]:
    """Zero errors when every name is consumed exactly once, and the same set is written."""
    paths = sorted(folder.glob("full_param_names*.txt"))
    for full in FULL[folder.name]:
        for path in paths:
            if full.file in ("", path.name):
                yield from _file(full, path)


def _file(full: Full, path: Path) -> Iterator[Row]:
    file, _ = BACKBONES[full.backbone]
    arch = file.arch(full.arch)
    config = original.model_config({}, full.backbone, arch)
    theirs = _named(path)
    ours = _shapes(vla.build(config))
    if full.whole:
        rows, ignore = maps.robovlms(config)
    else:
        rows, ignore = maps.hugging_face(config)
        ours = {k: v for k, v in ours.items() if k.startswith("backbone/")}
    renames = () if full.whole else getattr(file, "RENAMES", ())
    found = {renamed(name, renames): shape for name, shape in theirs.items()}
    report = weights.check(rows, ours, found, ignore)
    problems = sum(map(len, (report.missing, report.unexpected, report.misshaped)))
    what = f"{path.name}: {len(theirs)} names consumed once"
    yield compare(what + (f"\n{report}" if report else ""), problems, 0, 0.0)
    if found == theirs:
        written = {name for row in rows for name in row.expand(ours[row.targets[0]][0])}
        carried = {name for name in theirs if not weights.ignored(name, ignore)}
        yield compare(f"{path.name}: the same set written", len(written ^ carried), 0, 0.0)


def _named(path: Path) -> Shapes:
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: tuple(json.loads(shape)) for name, shape, *_ in lines}


def _shapes(model: vla.VLA) -> Shapes:
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def exported(
    rows: list[weights.Weight], flat: Mapping[str, Any], theirs: Mapping[str, np.ndarray]
) -> Row:
    """Zero error when every tensor of theirs that the map names came back to the bit."""
    back: dict[str, np.ndarray] = {}
    for row in rows:
        back |= weights.to_theirs(row, {k: np.asarray(flat[k]) for k in row.targets})
    changed = [k for k in back if k in theirs and not np.array_equal(back[k], theirs[k])]
    told = f" ({', '.join(changed)} changed)" if changed else ""
    return compare(f"{len(back)} tensors, exported again{told}", len(changed), 0, 0.0)
