"""The formats that can be trained on as they are. Adding one is one line in `READERS`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vla_jax.data.calvin import source as calvin
from vla_jax.data.errors import DataError
from vla_jax.data.features import Feature, load_features
from vla_jax.data.lerobot import source as lerobot
from vla_jax.data.places import DataPath, data_path, is_remote, require_disk, require_store
from vla_jax.data.rlds import index as rlds_index
from vla_jax.data.rlds import stream as stream_records
from vla_jax.data.source import Source
from vla_jax.data.source_annotated import ANNOTATIONS, NEEDED, SpanSource


@dataclass(frozen=True)
class Reader:
    """How one format is read.

    Attributes:
        marks: files relative to the data; any of them tells the format.
        splits: folder -> names of the splits.
        features: folder -> every feature, {path: Feature}.
        open: `open(folder, split, low, cache_dir, rebuild, skip=...)` -> the episodes, with the
            features `low` at hand. `cache_dir` and `rebuild` are those of `cached_folder`; `skip`
            leaves unsound episodes out.
        far: whether the data may lie behind a URL; a file for every frame had better not.
    """

    marks: tuple[str, ...]
    splits: Callable[[Any], Sequence[str]]
    features: Callable[[Any], Mapping[str, Feature]]
    open: Callable[..., Source]
    far: bool = True


def _open_rlds(
    folder: DataPath,
    split: str,
    low: Sequence[str],
    cache_dir: str,
    rebuild: bool,
    skip: bool,
    check_crc: bool = False,
) -> Source:
    annotated = ANNOTATIONS in load_features(folder / "features.json")
    # The spans are found by these columns, whether or not the run asks for them.
    low = [*low, *NEEDED] if annotated else low
    index = rlds_index.open_index(folder, split, low, cache_dir, rebuild, check_crc, skip)
    return SpanSource(index) if annotated else index


READERS: dict[str, Reader] = {
    "RLDS": Reader(
        ("dataset_info.json",),
        rlds_index.split_names,
        lambda folder: load_features(folder / "features.json"),
        _open_rlds,
    ),
    "CALVIN": Reader(
        ("training/ep_start_end_ids.npy", "validation/ep_start_end_ids.npy"),
        calvin.split_names,
        calvin.features,
        calvin.open_calvin,
        far=False,
    ),
    "LeRobot": Reader(
        ("meta/info.json",), lerobot.split_names, lerobot.features, lerobot.open_lerobot
    ),
}


def find_reader(directory: str | DataPath, kind: str = "index", check_crc: bool = False) -> Reader:
    """The reader of the data in a folder.

    Args:
        directory: a folder, or the URL of one.
        kind: `data.reader`: "stream" reads RLDS from front to back.
        check_crc: the RLDS index checks the CRCs of what it indexes; the others always do, as far
            as their files have some.

    Raises:
        DataError: there are none of a known format; names the folders below that hold some.
    """
    folder, rlds = data_path(directory), READERS["RLDS"]
    if kind == "stream" and (
        # TensorFlow has readers of its own for URLs.
        is_remote(folder) or any((folder / mark).exists() for mark in rlds.marks)
    ):
        return Reader(
            rlds.marks,
            stream_records.split_names,
            stream_records.features,
            stream_records.open_stream,
        )
    require_store(folder)
    for reader in READERS.values():
        if any((folder / mark).exists() for mark in reader.marks):
            if not reader.far:
                require_disk(folder, "this format")
            # The other readers take no such argument: they check whatever has checksums.
            if reader is rlds and check_crc:
                return replace(rlds, open=functools.partial(_open_rlds, check_crc=True))
            return reader
    # Naming the folder above or below the data is a common slip.
    near = [folder.parent, *folder.glob("*"), *folder.glob("*/*")]
    marked = [p for p in near if any((p / m).exists() for r in READERS.values() for m in r.marks)]
    hint = f"; did you mean one of {sorted(map(str, marked))[:5]}?" if marked else ""
    formats = ", ".join(f"{name} ({r.marks[0]})" for name, r in READERS.items())
    if is_remote(folder):
        # fsspec takes a server that does not answer for one that has no such file.
        problem = f"shows none of the known formats: {formats}{hint}"
        doubts = "is the address right, does it answer, and may you read there?"
        raise DataError(f"{problem}; {doubts}", str(folder))
    if not folder.is_dir():
        raise DataError(f"is no folder{hint}", folder)
    raise DataError(f"holds none of the known formats: {formats}{hint}", folder)
