"""The files of CALVIN's download, one .npz a frame."""

import hashlib
import lzma
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError, TruncatedShardError
from vla_jax.data.places import stamp
from vla_jax.files import explain_content, is_foreign

# What numpy and zipfile raise of a damaged archive; some of it is arithmetic on its numbers.
_DAMAGE = (
    OSError, ValueError, zlib.error, LookupError, TypeError, SyntaxError, NotImplementedError,
    RuntimeError, OverflowError, MemoryError, struct.error, lzma.LZMAError,
)  # fmt: skip
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
        # Other files may lie beside the frames; the form that most names have is theirs.
        forms: Counter[tuple[str, int]] = Counter()
        try:
            for path in folder.iterdir():
                match = re.fullmatch(r"(.*?)(\d+)\.npz", path.name)
                if match and not is_foreign(path):
                    forms[match[1], len(match[2])] += 1
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", folder) from error
        if not forms:
            raise DataError("holds no frames (episode_0000000.npz)", folder)
        self.prefix, self.digits = forms.most_common(1)[0][0]

    def path(self, frame: int) -> Path:
        """File of a frame."""
        return self.folder / f"{self.prefix}{frame:0{self.digits}d}.npz"

    def stamps(self, frames: Sequence[int]) -> str:
        """Changes when one of these frames is replaced or written to."""
        digest = hashlib.sha256()
        for frame in frames:
            digest.update(repr(stamp(self.path(frame))).encode())
        return digest.hexdigest()

    def size(self, frame: int) -> int:
        """Size of a frame's file in bytes, -1 if it is missing."""
        path = self.path(frame)
        return path.stat().st_size if path.exists() else -1


def load(path: Path, members: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a frame; None = all.

    Raises:
        DataError: the file, or one of the arrays, is missing or unsound.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        # numpy takes any file that is no archive for a pickle, and its message says so.
        if head[:2] != b"PK":
            if not head:
                raise TruncatedShardError("the frame cannot be read: its end is missing", path)
            problem = explain_content(head) or "it is no .npz"
            raise CorruptRecordError(f"the frame cannot be read: {problem}", path)
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
    except _DAMAGE as error:
        raise CorruptRecordError(f"the frame cannot be read: {error}", path) from error


def sample(files: Files, recordings: Int64[np.ndarray, "r 2"]) -> dict[str, np.ndarray]:
    """The arrays of the first frame that is sound.

    Raises:
        DataError: of the first frame, where none of those tried is.
    """
    first: DataError | None = None
    for begin, last in recordings.tolist():
        # A download that broke off may lack a whole recording, so the next ones are tried, too.
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
                    actual = f"{values.dtype} {values.shape}"
                    raise FeatureError(f"{member!r} is {actual}, not numbers {shape}", path)
                with np.errstate(over="ignore"):
                    rows[members[member]][row] = values
        except DataError as error:
            unsound.append((frame, type(error).__name__, error.problem))
    return rows, unsound
