"""Damages small datasets at random: no traceback, and no other data without a word.

    python -m tests.data.fuzz --count=1000 --seed=0

Every mutation is of one of these kinds: bytes of a file (cut, flipped, zeroed, added, emptied), a
file (removed, exchanged with another, replaced by a pointer of Git LFS or a web page, foreign ones
beside it), a value of JSON metadata, a column or the rows of a table, a value of an array; every
third dataset has two of them. Bytes are flipped where the format keeps a checksum of them:
TFRecord, zip, parquet pages, PNG. What no file says twice is not changed: actions and pixels
themselves, the order of records without numbers. A text has no checksum: instructions are not
compared.
"""

import argparse
import collections
import contextlib
import json
import logging
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from tests.data import look_alikes
from tests.data.rlds.test_containers import convert
from vla_jax.data import features
from vla_jax.data.errors import DataError, Skips
from vla_jax.data.open_dataset import open_dataset
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.data.spec import DatasetSpec, Trajectory

LENGTHS = (4, 5, 6, 3, 4, 5)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
_CHECKSUMS = (".npz", ".parquet")


def _standardize(e):
    return Trajectory(e["action"], e["text"])


def _spec(camera, action):
    return DatasetSpec(
        images={"primary": camera},
        features={"action": action, "text": "language_instruction"},
        standardize=_standardize,
        gripper_env=(0.0, 1.0),
    )


def write_rlds(folder):
    """Six episodes in three shards, PNG images."""
    described = {
        "steps": {
            "observation": {"front": features.image(8, 12, "png")},
            "action": features.tensor((7,)),
            "language_instruction": features.text(),
        }
    }
    rng = np.random.default_rng(0)
    with RLDSWriter(folder, "my_robot", described, shard_bytes=4000) as out:
        for number, length in enumerate(LENGTHS):
            action = rng.normal(size=(length, 7)).astype(np.float32)
            front = rng.integers(0, 255, (length, 8, 12, 3)).astype(np.uint8)
            steps = {"observation": {"front": front}, "action": action,
                     "language_instruction": f"task {number}"}  # fmt: skip
            out.write("train", {"steps": steps})


def write_container(folder, kind):
    """The RLDS dataset in files of another format."""
    write_rlds(folder)
    convert(folder, kind)


def write_lerobot(folder, version, images="image"):
    """The look-alike with images in parquet or in videos, with checksums of the tables' pages."""
    import pyarrow.parquet as parquet

    look_alikes.write_lerobot(folder, version, images)
    for path in folder.rglob("*.parquet"):
        parquet.write_table(parquet.read_table(path), path, write_page_checksum=True)


def write_calvin(folder):
    """Three annotated spans in two recordings."""
    first = look_alikes.START
    look_alikes.write_calvin_npz(
        folder,
        ((first, first + 14), (first + 30, first + 39)),
        ((2, 8), (5, 12), (31, 38)),
        splits=("training",),
    )


FORMATS = {
    "rlds": (write_rlds, _spec("observation/front", "action"), "index"),
    "stream": (write_rlds, _spec("observation/front", "action"), "stream"),
    "array_record": (
        lambda f: write_container(f, "array_record"), _spec("observation/front", "action"), "index"
    ),
    "parquet": (
        lambda f: write_container(f, "parquet"), _spec("observation/front", "action"), "index"
    ),
    "lerobot video v2.1": (
        lambda f: write_lerobot(f, "v2.1", "video"),
        _spec("observation/images/front", "action"), "index",
    ),
    "lerobot video v3.0": (
        lambda f: write_lerobot(f, "v3.0", "video"),
        _spec("observation/images/front", "action"), "index",
    ),
    "lerobot v2.1": (
        lambda f: write_lerobot(f, "v2.1"), _spec("observation/images/front", "action"), "index"
    ),
    "lerobot v3.0": (
        lambda f: write_lerobot(f, "v3.0"), _spec("observation/images/front", "action"), "index"
    ),
    "calvin": (write_calvin, _spec("observation/rgb_static", "action/rel_actions"), "index"),
}  # fmt: skip


def read(name, folder, cache, skip):
    """Number of each episode -> its actions and pixels, through the code that training uses."""
    from vla_jax.data.formats import find_reader

    _, spec, kind = FORMATS[name]
    skips = Skips(name, "skip" if skip else "error")
    dataset = open_dataset(
        name, spec, folder, "train", ["primary"], 7, cache_dir=str(cache), skips=skips,
        reader=find_reader(folder, kind),
    )  # fmt: skip
    collected = {}
    height, width = dataset.image_sizes.get("primary", (8, 12))  # black where there is none
    _, places = dataset.in_source()
    for episode, length in enumerate(dataset.lengths.tolist()):
        out = np.zeros((length, height, width, 3), np.uint8)
        try:
            present = dataset.images("primary", episode, np.arange(length), out)
        except DataError as error:
            skips.add(error)
            continue
        rows = slice(int(dataset.starts[episode]), int(dataset.starts[episode + 1]))
        number = int(dataset.source.numbers[places[episode]])
        collected[number] = (dataset.actions[rows].copy(), out, present)
    return collected


def alike(found, sound):
    """Whether all episodes are there, and as they were recorded."""
    return found.keys() == sound.keys() and all(
        all(np.array_equal(a, b) for a, b in zip(found[n], sound[n], strict=True)) for n in sound
    )


def mutate(folder, rng):
    """Damages one file of a dataset; says how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    checked = path.suffix in _CHECKSUMS or ".tfrecord" in path.name or "array_rec" in path.name
    ways = [_cut, _empty, _remove, _exchange, _point, _web, _beside, _grow]
    ways += [_flip] * 3 + [_zero] * 2 if checked else []
    ways += [_json] * 12 if path.suffix in (".json", ".jsonl") else []
    ways += [_table] * 6 if path.suffix == ".parquet" else []
    ways += [_array] * 6 if path.suffix == ".npy" else []
    way = ways[rng.integers(len(ways))]
    return f"{way.__name__} {path.relative_to(folder)} {way(path, rng, files) or ''}"


def _cut(path, rng, files):
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def _empty(path, rng, files):
    path.write_bytes(b"")


def _remove(path, rng, files):
    path.unlink()


def _exchange(path, rng, files):
    # Two frames, or two shards of as many episodes, cannot be told apart when they change places.
    twins = path.suffix == ".npz" or path.name.startswith("my_robot-train.")
    kind = {path.suffix, path.name[:9]}
    remaining = [p for p in files if not twins or not {p.suffix, p.name[:9]} & kind]
    other = remaining[rng.integers(len(remaining))]
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return f"with {other.name}"


def _point(path, rng, files):
    path.write_bytes(POINTER)


def _web(path, rng, files):
    path.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")


def _beside(path, rng, files):
    for name in (f"._{path.name}", ".DS_Store", "notes.txt"):
        path.with_name(name).write_bytes(rng.bytes(100))


def _grow(path, rng, files):
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 40))))


def _flip(path, rng, files):
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), int(rng.integers(1, 4))).tolist():
        data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def _zero(path, rng, files):
    data = bytearray(path.read_bytes())
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 200))
    data[at : at + size] = bytes(len(data[at : at + size]))
    path.write_bytes(data)


def _table(path, rng, files):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    # An action is written once, and so is what a task is called: nothing could tell another.
    names = [n for n in table.column_names if n not in ("action", "task", "tasks", "note", "data")]
    name = names[rng.integers(len(names))] if names else "data"
    number, row = table.column_names.index(name), int(rng.integers(len(table)))
    values = table[name].to_pylist()
    ways = ["drop", "rename", "cut", "null", "repeat"]
    ways += ["shuffle"] * (name != "data")
    ways += ["change", "text", "float"] * (not isinstance(values[0], list | dict | bytes))
    way = ways[rng.integers(len(ways))]
    if way == "drop":
        table = table.drop_columns([name])
    elif way == "rename":
        table = table.rename_columns(["x" if n == name else n for n in table.column_names])
    elif way == "cut":
        table = table.slice(0, row)
    elif way == "repeat":
        table = arrow.concat_tables([table, table.slice(row, 1)])
    elif way == "shuffle":
        table = table.take(rng.permutation(len(table)))
    else:
        kinds = {"text": arrow.string(), "float": arrow.float64()}
        kind = kinds.get(way, table.schema[number].type)
        if way == "text":
            values = [str(value) for value in values]
        elif way == "float":
            values = [float(value) if not isinstance(value, str) else None for value in values]
        elif way == "change" and not isinstance(values[row], str):
            values[row] = [-1, 0, 1, 7, 10**9, values[row] + 1][rng.integers(6)]
        else:
            values[row] = None
        try:
            table = table.set_column(number, name, arrow.array(values, kind))
        except arrow.ArrowException:
            return "nothing: no such value"
    parquet.write_table(table, path, write_page_checksum=True)
    return f"{way} {name!r} row {row}"


def _array(path, rng, files):
    values = np.load(path, allow_pickle=True)
    way = ["cut", "type", "change", "shape"][rng.integers(4)]
    if values.dtype == object and way in ("change", "type"):
        tree = values.item() if not values.ndim else values
        holder, key = list(_places(tree))[rng.integers(len(list(_places(tree))))]
        old = holder[key]
        holder[key] = [None, [], {}, "word", -1, [[0, 1]], 10**9][rng.integers(7)]
        np.save(path, np.array(tree, object), allow_pickle=True)
        return f"{way} {key!r}: {str(old)[:30]}"
    if way == "type":
        values = values.astype([np.float64, np.int8, str][rng.integers(3)])
    elif way == "change" and values.size:
        values.flat[rng.integers(values.size)] = [-1, 0, 10**6, 358485][rng.integers(4)]
    elif way == "cut" and values.ndim:
        values = values[: rng.integers(len(values) + 1)]
    else:
        values = values.reshape(-1)
    np.save(path, values, allow_pickle=True)
    return way


def _json(path, rng, files):
    lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    number = int(rng.integers(max(len(lines) - 1, 1)))
    tree = json.loads(lines[number])
    places = list(_places(tree))
    holder, key = places[rng.integers(len(places))]
    old = holder[key]
    values = [None, "", "word", [], {}, -1, 0, 1, 3, 10**12, 0.5, float("nan"), True, [[1]], "0:2",
              "../../x", "{x}"]  # fmt: skip
    if isinstance(old, int) and not isinstance(old, bool):
        values += [old + 1, old - 1, str(old)] * 3
    if rng.random() < 0.2:
        del holder[key]
        new = "gone"
    else:
        new = holder[key] = values[rng.integers(len(values))]
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines))
    return f"{key!r}: {str(old)[:30]!r} -> {new!r}"


def _places(tree):
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run(count, seed, names=tuple(FORMATS)):
    """Mutates each format in turn; returns what came out and what must not have."""
    outcomes, failures = collections.Counter(), []
    heard, log = _Heard(), logging.getLogger("vla_jax")
    log.addHandler(heard)
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        sound = {}
        for name in names:
            FORMATS[name][0](work / "sound" / name / "1.0.0")
            sound[name] = read(name, work / "sound" / name / "1.0.0", work / "cache", False)
        for number in range(count):
            name = names[number % len(names)]
            rng = np.random.default_rng([seed, number])
            folder = work / "damaged" / "1.0.0"
            shutil.rmtree(work / "damaged", ignore_errors=True)
            shutil.rmtree(work / "cache", ignore_errors=True)
            shutil.copytree(work / "sound" / name / "1.0.0", folder)
            how = f"{name} {seed}/{number}: {mutate(folder, rng)}"
            if number % 3 == 0:
                # What is damaged already may be beyond being changed once more.
                with contextlib.suppress(Exception):
                    how += f" and {mutate(folder, rng)}"
            heard.lines.clear()
            began = time.monotonic()
            try:
                content = read(name, folder, work / "cache", skip=bool(rng.integers(2)))
            except DataError:
                outcomes["refused"] += 1
            except Exception:
                failures.append(f"{how}\n{traceback.format_exc()}")
            else:
                same = alike(content, sound[name])
                outcomes["the same" if same else "others, with a message"] += 1
                if not same and not heard.lines:
                    failures.append(f"{how}: other data without a word")
            longest = max(longest, time.monotonic() - began)
    log.removeHandler(heard)
    return outcomes, failures, longest


def main():
    parser = argparse.ArgumentParser(description="Mutate small datasets and read them.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    flags = parser.parse_args()
    logging.getLogger("vla_jax").propagate = False
    outcomes, failures, longest = run(flags.count, flags.seed, tuple(flags.formats))
    for failure in failures:
        print(failure)
    print(f"{flags.count} mutations, seed {flags.seed}: {dict(outcomes)}, longest {longest:.1f} s")
    raise SystemExit(f"{len(failures)} failures" if failures else 0)


if __name__ == "__main__":
    main()
