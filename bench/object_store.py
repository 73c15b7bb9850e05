"""Samples per second out of an object store, beside the same data on a local disk, in one run.

    python bench/object_store.py --data DIR --window 1 8
    python bench/object_store.py --lerobot DIR --window 1 8

DIR of --data holds bridge_dataset/1.0.0; DIR of --lerobot is a set that bench/lerobot_video.py has
written. The store is a web server in a process of its own on this machine, which answers a request
after 20 ms and sends ranges of bytes. Disk and store take turns, each in a fresh process with an
index that is there already; batches of 32 samples, ten actions, all threads of the loader as it
sets them. What the server sent says that nothing is read whole; a store's loader that is stopped
and started at its position must give the batches that would have come.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing

from bench import lerobot_video
from bench.loader import CHUNK, DATASET
from bench.range_server import RangeServer
from configs.base import get_config
from vla_jax.config import resolve
from vla_jax.data.loader import Loader
from vla_jax.data.mixture import Mixture, open_datasets

BATCH = 32


def main() -> None:
    """Measures every window and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help=f"holds {DATASET}/1.0.0")
    data.add_argument("--lerobot", type=Path, help="a LeRobot set of two cameras")
    parser.add_argument("--window", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--latency", type=float, default=0.02, help="s, of the store's answers")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured, a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--where", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve(args)
    elif args.where:
        print(json.dumps(_measure(args)))
    else:
        with tempfile.TemporaryDirectory() as cache:
            rows = [_compare(args, window, Path(cache)) for window in args.window]
        _report(rows)
        if args.json:
            args.json.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1))


def _compare(args: argparse.Namespace, window: int, cache: Path) -> dict[str, Any]:
    folder = args.lerobot.resolve() if args.lerobot else args.data.resolve() / DATASET / "1.0.0"
    command = [sys.executable, __file__, "--window", str(window), "--seconds", str(args.seconds)]
    command += ["--lerobot" if args.lerobot else "--data", str(folder)]
    env = os.environ | {"HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    serve = [*command, "--serve", str(folder), "--latency", str(args.latency)]
    with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        assert store.stdout is not None
        assert store.stdin is not None
        places = {"disk": str(folder), "store": store.stdout.readline().strip()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
        for repeat in range(args.repeats + 1):
            for name, where in places.items():
                done = subprocess.run(
                    [*command, "--where", where], stdout=subprocess.PIPE, check=True, env=env
                )
                if repeat:  # the first one of each makes the index
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        sent, _ = store.communicate("stop\n")
    pairs = zip(runs["disk"], runs["store"], strict=True)
    ratios = sorted(s["samples_per_s"] / d["samples_per_s"] for d, s in pairs)
    row = {
        name: {key: statistics.median(r[key] for r in results) for key in ("samples_per_s", "cpu")}
        for name, results in runs.items()
    }
    same = {tuple(run["digests"]) for results in runs.values() for run in results}
    return {"window": window, **row, "ratios": ratios, "same": len(same) == 1, **json.loads(sent)}


def _serve(args: argparse.Namespace) -> None:
    with RangeServer(args.serve, args.latency) as server:
        print(server.url, flush=True)
        sys.stdin.readline()
        size = sum(p.stat().st_size for p in args.serve.rglob("*") if "vla_index" not in p.parts)
        largest = max((part for _, _, part in server.requests), default=0)
        print(json.dumps({"requests": len(server.requests), "largest": largest, "size": size}))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the loader over one place in this process."""
    (window,) = args.window
    with _loader(args, window, 0) as loader:
        digests = [_digest(next(loader)) for _ in range(4)]
        position = loader.state()
        begun, cpu, samples = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begun < args.seconds:
            samples += len(next(loader).sample)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    with _loader(args, window, position | {"samples": 2 * BATCH}) as resumed:
        if [_digest(next(resumed)) for _ in range(2)] != digests[2:]:
            raise SystemExit("a resumed loader gave other batches")
    return {"samples_per_s": samples / wall, "cpu": cpu / wall, "digests": digests}


def _loader(args: argparse.Namespace, window: int, start: Any) -> Loader:
    return Loader(_open(args, window), _encode, BATCH, seed=0, start=start)


def _open(args: argparse.Namespace, window: int) -> Mixture:
    c = get_config()
    spec, cameras = DATASET, ("primary",)
    if args.lerobot:
        spec, cameras = f"{Path(lerobot_video.__file__).resolve()}:spec", ("primary", "wrist")
    c.data.update({"datasets": ({"spec": spec, "dir": args.where, "weight": 1.0},)})
    c.data.cache_dir = str(Path.home() / f"index_{'store' if '://' in args.where else 'disk'}")
    c.model.structure.update({"window": window, "chunk": CHUNK, "cameras": cameras})
    config = resolve(c)
    return open_datasets(config.data, config.model.structure, 7, "train")


def _encode(text: str) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(8, np.int32), np.ones(8, bool)


def _digest(batch: Any) -> str:
    return "-".join(
        str(int(image.astype(np.int64).sum())) for image in batch.observation.images.values()
    )


def _report(rows: list[dict[str, Any]]) -> None:
    print(
        "| window | samples/s, disk | samples/s, store | store / disk, median (least to most) |"
        " cores busy, disk / store | samples a CPU second of the loader, disk / store |"
        " requests | largest of them, MB | data, MB | same batches |\n" + "|---" * 10 + "|"
    )
    for row in rows:
        disk, store, ratios = row["disk"], row["store"], row["ratios"]
        thrift = [place["samples_per_s"] / place["cpu"] for place in (disk, store)]
        print(
            f"| {row['window']} | {disk['samples_per_s']:.0f} | {store['samples_per_s']:.0f} |"
            f" {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
            f" {disk['cpu']:.2f} / {store['cpu']:.2f} |"
            f" {thrift[0]:.0f} / {thrift[1]:.0f} | {row['requests']} |"
            f" {row['largest'] / 1e6:.2f} | {row['size'] / 1e6:.0f} | {row['same']} |"
        )


if __name__ == "__main__":
    main()
