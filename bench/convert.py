"""Memory and time of converting a full-size VLM: Hugging Face folder -> checkpoint -> folder.

    python bench/convert.py --scratch SCRATCH

Writes a folder of the released architecture with random float32 weights (Kosmos-2: 7 GB; the
scratch folder needs twice that), converts it with launch/convert.py there and back, compares every
tensor to the bit, deletes what it wrote and prints one line of JSON. Exits with 1 if a tensor
differs or a command takes more than 4 GB of memory. Nothing here holds more than one tensor either.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without installing

from vla_jax import progress  # noqa: E402
from vla_jax.config import Config, load_config_file, resolve  # noqa: E402
from vla_jax.convert import importing, maps  # noqa: E402
from vla_jax.convert.formats.safetensors import Safetensors, Writer  # noqa: E402
from vla_jax.convert.hf.files import write_json  # noqa: E402
from vla_jax.convert.tensors import Lazy, same_bytes  # noqa: E402
from vla_jax.models import vla  # noqa: E402

LIMIT = 4e9  # bytes of memory
SHARD = 5 * 10**9  # bytes of a file


def main() -> int:
    """Write, convert twice, compare, clean up, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True, help="where the files go for now")
    parser.add_argument("--config", default=str(ROOT / "configs" / "kosmos_ph.py"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change the config, e.g. a smaller model.backbone.arch")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    config = resolve(load_config_file(flags.config, flags.set))
    flags.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
        result = _measure(config, flags, Path(scratch))
    print(json.dumps(result))
    return 0 if result["differing"] == 0 and result["within_limit"] else 1


def _measure(config: Config, flags: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model = vla.build(config.model)
    shapes = importing.shapes_of(model)
    leaves = {
        path: Lazy(shape, np.dtype(np.float32), lambda: np.empty(0))
        for path, shape in shapes.items()
        if path.startswith("backbone/")
    }
    rows, _ = maps.hugging_face(config.model)
    theirs = maps.outgoing(rows, leaves)
    source, run, out = (scratch / name for name in ("source", "run", "out"))
    began = time.perf_counter()
    _write(source, model, theirs, flags.seed)
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in source.iterdir())
    changes = [f"--set={change}" for change in flags.set]
    imported = _run("import-hf", source, run, f"--config={flags.config}", *changes)
    shutil.rmtree(source)  # the export has to do without it; its tensors can be made again
    stored = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    exported = _run("export-hf", run, out)
    return {
        "backbone": config.model.backbone.name,
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "source_gb": round(size / 1e9, 2),
        "checkpoint_gb": round(stored / 1e9, 2),
        "write_s": round(written, 1),
        "import": imported,
        "export": exported,
        "tensors": len(theirs.shapes),
        "differing": _differing(out, theirs, flags.seed),
        "within_limit": max(x["peak_rss_gb"] for x in (imported, exported)) * 1e9 <= LIMIT,
    }


def _tensor(name: str, theirs: maps.Outgoing, seed: int) -> np.ndarray:
    """The random tensor of a name; an alias has its original's."""
    name = theirs.aliases.get(name, name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return 0.02 * rng.standard_normal(theirs.shapes[name], np.float32)


def _write(folder: Path, model: vla.VLA, theirs: maps.Outgoing, seed: int) -> None:
    folder.mkdir()
    write_json(folder / "config.json", model.arch)
    with Writer(folder, theirs.shapes, theirs.dtypes, SHARD) as writer:
        for name in progress.bar(theirs.shapes, desc="write", unit="tensor"):
            writer.write(name, _tensor(name, theirs, seed))


def _differing(folder: Path, theirs: maps.Outgoing, seed: int) -> int:
    found = Safetensors(folder)
    differing = set(found.shapes) ^ set(theirs.shapes)
    for name in progress.bar(sorted(set(theirs.shapes) - differing), desc="compare", unit="tensor"):
        if not same_bytes(found.read(name), _tensor(name, theirs, seed)):
            differing.add(name)
    return len(differing)


def _run(*arguments: Any) -> dict[str, float]:
    """launch/convert.py in a process of its own; what it took."""
    command = [sys.executable, ROOT / "launch" / "convert.py", *map(str, arguments)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_gb": round(peak / 1e9, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
