"""The files of CALVIN's download, one .npz a frame."""

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError, TruncatedShardError

_TRIED = 8  # frames of a recording that are tried for what frames hold
# Frame id, kind of error, problem.
Unsound = tuple[int, str, str]


class Files:
    """Names of the frames' files, whose number of digits is found out from one of them."""

    def __init__(self, folder: Path):
        """Looks into `folder`.

        Raises:
            DataError: it holds no frames.
        """
        self.folder = folder
        names = (re.fullmatch(r"(.*?)(\d+)\.npz", path.name) for path in folder.iterdir())
        found = next((name for name in names if name), None)
        if found is None:
            raise DataError("holds no frames (episode_0000000.npz)", folder)
        self.prefix, self.digits = found[1], len(found[2])

    def path(self, frame: int) -> Path:
        """File of a frame."""
        return self.folder / f"{self.prefix}{frame:0{self.digits}d}.npz"

    def size(self, frame: int) -> int:
        """Bytes of a frame's file, -1 if it is missing."""
        path = self.path(frame)
        return path.stat().st_size if path.exists() else -1


def load(path: Path, members: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a frame; None = all.

    Raises:
        DataError: the file, or one of the arrays, is missing or unsound.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(2)
        if head and head != b"PK":
            raise CorruptRecordError("the frame cannot be read: it is no .npz", path)
        with np.load(path) as archive:
            wanted = archive.files if members is None else members
            missing = [member for member in wanted if member not in archive]
            if missing:
                raise FeatureError(f"the frame has no arrays {missing}: {archive.files}", path)
            return {member: archive[member] for member in wanted}
    except FileNotFoundError:
        raise DataError("the frame's file is missing", path) from None
    except DataError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        # The list of an archive's members is its end.
        cut = "not a zip file" in str(error) or isinstance(error, EOFError)
        kind = TruncatedShardError if cut else CorruptRecordError
        problem = "its end is missing" if cut else error
        raise kind(f"the frame cannot be read: {problem}", path) from error
    except (OSError, ValueError, zlib.error) as error:
        raise CorruptRecordError(f"the frame cannot be read: {error}", path) from error


def sample(files: Files, recordings: Int64[np.ndarray, "r 2"]) -> dict[str, np.ndarray]:
    """The arrays of the first frame that is sound.

    Raises:
        DataError: of the first frame, where none of those tried is.
    """
    first: DataError | None = None
    for begin, last in recordings.tolist():
        for frame in range(begin, min(begin + _TRIED, last + 1)):
            try:
                return load(files.path(frame))
            except DataError as error:
                first = first or error
    raise first or DataError("holds no frames", files.folder)


def copy_low(
    job: tuple[Files, Sequence[int], Mapping[str, str], Mapping[str, tuple[int, ...]]],
) -> tuple[dict[str, np.ndarray], list[Unsound]]:
    """Numbers of some frames, and what is wrong with those that are unsound (not finite then).

    Args:
        job: the files, ids of the frames, path of a feature -> file stem, stem -> shape.
    """
    files, frames, stems, shapes = job
    members = {path.rsplit("/", 1)[1]: stem for path, stem in stems.items()}
    rows = {s: np.full((len(frames), *shape), np.nan, np.float32) for s, shape in shapes.items()}
    unsound = []
    for row, frame in enumerate(frames):
        path = files.path(frame)
        try:
            for member, values in load(path, list(members)).items():
                shape = shapes[members[member]]
                if values.shape != shape or values.dtype.kind not in "fiub":
                    found = f"{values.dtype} {values.shape}"
                    raise FeatureError(f"{member!r} is {found}, not numbers {shape}", path)
                rows[members[member]][row] = values
        except DataError as error:
            unsound.append((frame, type(error).__name__, error.problem))
    return rows, unsound
