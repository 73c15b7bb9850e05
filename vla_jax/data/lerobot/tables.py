"""The files of a LeRobot dataset that are no videos, read whole: JSON, JSON lines, parquet."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError, TruncatedShardError
from vla_jax.data.places import DataPath, is_remote
from vla_jax.files import explain_file, problem_of
from vla_jax.shipped import install_hint

_MAGIC = b"PAR1"  # at both ends of a parquet file
# What content that is not as expected makes code raise that takes it apart.
_MISTAKES = (AttributeError, LookupError, TypeError, ValueError, OverflowError)


@contextlib.contextmanager
def understood(path: DataPath, kind: str) -> Iterator[None]:
    """Turns what goes wrong inside into the news that a file is not `kind` it should be."""
    try:
        yield
    except DataError:
        raise
    except _MISTAKES as error:
        raise DataError(f"is not {kind} ({error!r})", path) from error


def read_json(path: DataPath) -> Any:
    """The content of a JSON file, with a byte order mark or without.

    Raises:
        DataError: it is missing or no JSON.
    """
    return _parsed(path, lambda text: json.loads(text))


def read_json_lines(path: DataPath) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line.

    A line ends at a line feed alone: a text may hold U+2028 and other characters that Python's
    `splitlines` would cut at.

    Raises:
        DataError: it is missing or not in this form.
    """

    def rows(text: str) -> list[dict[str, Any]]:
        objects = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in objects):
            raise ValueError("a line is no JSON object")
        return objects

    return _parsed(path, rows)


def _parsed(path: DataPath, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(problem_of(path, f"cannot be read: {error}"), path) from error


def read_table(path: DataPath, columns: list[str] | None = None) -> Any:
    """A parquet file as a pyarrow table.

    Raises:
        DataError: pyarrow, the file or a column is missing, or the file is unsound.
    """
    with opened_parquet(path) as file:
        lacking = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if lacking:
            problem = f"has no columns {lacking}; it has {file.schema_arrow.names}"
            raise FeatureError(problem, path)
        return file.read(columns)


@contextlib.contextmanager
def opened_parquet(path: DataPath) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what pyarrow raises becomes a `DataError`."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        hint = f"LeRobot's parquet files need pyarrow: {install_hint('lerobot')}"
        raise DataError(hint, path) from error
    try:
        # pyarrow takes the name of a file on a disk, and an opened file of any other place.
        where: Any = path.open("rb") if is_remote(path) else path
        # It compares checksums only where it is told to.
        with parquet.ParquetFile(where, page_checksum_verification=True) as file:
            yield file
    except (OSError, arrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: DataPath, error: Exception) -> DataError:
    """What to say of a parquet file that cannot be read."""
    if not path.exists():
        return DataError("the file is missing", path)
    other = explain_file(path)
    if other:
        return CorruptRecordError(other, path)
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(4)
        file.seek(max(path.stat().st_size - 4, 0))  # the magic stands at both ends
        if head == _MAGIC != file.read(4):
            return TruncatedShardError("cannot be read: its end is missing", path)
    return CorruptRecordError(f"cannot be read: {error}", path)
