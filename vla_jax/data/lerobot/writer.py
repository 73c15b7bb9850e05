"""Writes LeRobot v3.0 datasets with pictures in parquet; no torch, no lerobot.

    data/chunk-000/file-000.parquet              all frames of many episodes, a row group an episode
    meta/info.json   meta/stats.json   meta/tasks.parquet   meta/episodes/chunk-000/file-000.parquet

Source: lerobot/datasets of github.com/huggingface/lerobot.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.errors import FeatureError

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_FILE_BYTES = 100 << 20  # of pictures in a file, after which another is begun
_COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


class LeRobotWriter:
    """Writes episodes; a context manager. The dataset appears when all is written."""

    def __init__(
        self,
        directory: str | Path,
        fps: float,
        numbers: Mapping[str, tuple[int, ...]],
        cameras: Mapping[str, tuple[int, int, int]],
        robot: str = "unknown",
    ):
        """Prepares to write.

        Args:
            directory: the dataset's folder, which must not exist.
            fps: frames in 1/s.
            numbers: name of a float32 feature, such as "action" -> its shape.
            cameras: name of a camera, such as "observation.images.front" -> height, width, 3.
            robot: its kind, for people.

        Raises:
            FileExistsError: the directory exists.
            ImportError: pyarrow is not installed.
        """
        import pyarrow as pa

        self._target = Path(directory).expanduser()
        if self._target.exists():
            raise FileExistsError(f"{self._target} exists")
        self._fps, self._robot = fps, robot
        self._numbers, self._cameras = dict(numbers), dict(cameras)
        # Beside the target, so that the dataset appears by one rename.
        self._work = self._target.with_name(f".{self._target.name}.{os.getpid()}")
        shutil.rmtree(self._work, ignore_errors=True)
        picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        # Lists of one fixed length, as LeRobot declares them.
        types = {name: pa.list_(pa.float32(), int(np.prod(s))) for name, s in numbers.items()}
        types |= dict.fromkeys(cameras, picture)
        types |= {name: pa.type_for_alias(dtype) for name, dtype in _COUNTERS.items()}
        self._schema = pa.schema(types)
        self._file: Any = None
        self._files = self._bytes = self._frames = 0
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._sums = {name: _Statistics() for name in numbers}

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._close()
        else:
            shutil.rmtree(self._work, ignore_errors=True)

    def write(self, values: Mapping[str, Any], task: str) -> None:
        """Appends one episode of t frames.

        Args:
            values: every feature: numbers [t, ...], of a camera t encoded pictures.
            task: the instruction.

        Raises:
            FeatureError: features are missing, unknown, or of the wrong length or shape.
        """
        import pyarrow as pa

        steps = self._check(values)
        number, at = len(self._episodes), self._frames
        task_number = self._tasks.setdefault(task, len(self._tasks))
        columns: dict[str, Any] = {}
        for name in self._numbers:
            array = np.asarray(values[name], np.float32).reshape(steps, -1)
            self._sums[name].add(array)
            columns[name] = pa.FixedSizeListArray.from_arrays(array.reshape(-1), array.shape[1])
        size = 0
        for name in self._cameras:
            pictures = [bytes(picture) for picture in values[name]]
            size += sum(map(len, pictures))
            # LeRobot's struct of an image: without a path the bytes count.
            columns[name] = pa.array(
                [{"bytes": picture, "path": None} for picture in pictures],
                self._schema.field(name).type,
            )
        frames = np.arange(steps)
        columns["timestamp"] = pa.array((frames / self._fps).astype(np.float32))
        columns |= {"frame_index": frames, "index": at + frames}
        columns |= {"episode_index": np.full(steps, number), "task_index": [task_number] * steps}
        # One call makes one row group, so that an episode can be read by itself.
        self._next_file(size).write_table(pa.table(columns, self._schema))
        # All files are in one chunk, as their numbers may go past three digits.
        place = {"data/chunk_index": 0, "data/file_index": self._files - 1}
        place |= {"dataset_from_index": at, "dataset_to_index": at + steps}
        place |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.append({"episode_index": number, "tasks": [task], "length": steps, **place})
        self._frames += steps

    def _check(self, values: Mapping[str, Any]) -> int:
        """Number of frames of an episode that can be written."""
        expected = {*self._numbers, *self._cameras}
        problems = []
        if set(values) != expected:
            problems.append(f"features {sorted(values)}, not {sorted(expected)}")
        lengths = {name: len(value) for name, value in values.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values()), 0):
            problems.append(f"frames of unequal or no length: {lengths}")
        for name, shape in self._numbers.items():
            actual = np.shape(values.get(name, ()))[1:]
            if name in values and actual != shape:
                problems.append(f"{name} has shape {actual}, not {shape}")
        if problems:
            raise FeatureError("; ".join(problems), self._target)
        return next(iter(lengths.values()))

    def _next_file(self, size: int) -> Any:
        import pyarrow.parquet as pq

        # A new one begins before an episode that does not fit, so that none is cut in two.
        if self._file is None or self._bytes + size > _FILE_BYTES:
            if self._file is not None:
                self._file.close()
            path = self._work / _DATA.format(chunk_index=0, file_index=self._files)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._bytes = pq.ParquetWriter(path, self._schema), 0
            self._files += 1
        self._bytes += size
        return self._file

    def _close(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._episodes:
            raise FeatureError("a dataset of no episodes", self._target)
        path = self._work / _EPISODES
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), path)
        tasks = {"task_index": list(self._tasks.values()), "task": list(self._tasks)}
        pq.write_table(pa.table(tasks), self._work / "meta" / "tasks.parquet")
        self._write_json("stats", {name: each.summary() for name, each in self._sums.items()})
        self._write_json("info", self._info())
        os.replace(self._work, self._target)

    def _info(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            name: {"dtype": "float32", "shape": list(shape), "names": None}
            for name, shape in self._numbers.items()
        }
        axes = ["height", "width", "channels"]
        for name, shape in self._cameras.items():
            described[name] = {"dtype": "image", "shape": list(shape), "names": axes}
        for name, dtype in _COUNTERS.items():
            described[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": _FILE_BYTES >> 20,
            "video_files_size_in_mb": 0,
            # LeRobot declares a whole number, so a fraction is written only where there is one.
            "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA,
            "video_path": None,
            "features": described,
        }

    def _write_json(self, name: str, value: Any) -> None:
        path = self._work / "meta" / f"{name}.json"
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")


class _Statistics:
    """Collects the rows of one feature and sums them up."""

    def __init__(self):
        self._parts: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        # In float64, as sums over millions of float32 lose digits.
        self._parts.append(rows.astype(np.float64))

    def summary(self) -> dict[str, Sequence[float]]:
        rows = np.concatenate(self._parts)
        moments = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
        return {**{name: value.tolist() for name, value in moments.items()}, "count": [len(rows)]}
