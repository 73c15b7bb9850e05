"""Samples per CPU-second out of LeRobot v3.0 videos, beside LeRobot's own loader, in one run.

    python bench/lerobot_video.py --data DIR --lerobot PYTHON --work DIR --json FILE

DIR of --data holds bridge_dataset/1.0.0, whose pictures the videos are made of. PYTHON is the
interpreter of an environment with LeRobot and torchcodec (which needs FFmpeg's libraries on
LD_LIBRARY_PATH); it writes the sets, once, and loads them as LeRobot trains: torchcodec, two
workers, uint8. Both sides draw batches of 32 samples at random, two cameras of 224 x 224, ten
actions, and take turns; CPU-seconds (user and system, workers included) are the measure, as wall
time depends on what else the machine does.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Runs without installing; of another checkout with that one's package.
sys.path.insert(0, os.environ.get("VLA_JAX_BENCH_BASE", str(Path(__file__).resolve().parents[1])))

from bench.loader import _mixture
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.spec import DatasetSpec, Trajectory

SETS = {
    "AV1, g 2": ("libsvtav1", 2),
    "h264, g 2": ("h264", 2),
    "h264, g 60": ("h264", 60),
}
BATCH, CHUNK, THREADS = 32, 10, 2
SIDE = Path(__file__).with_name("lerobot_side.py")

spec = DatasetSpec(
    images={"primary": "observation/images/front", "wrist": "observation/images/wrist"},
    features={"action": "action", "language": "language_instruction"},
    standardize=lambda e: Trajectory(action=e["action"], language=e["language"]),
    gripper_env=(0.0, 1.0),
)


def main() -> None:
    """Writes what is missing, compares pixels, measures, prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="holds bridge_dataset/1.0.0")
    parser.add_argument("--lerobot", help="Python with LeRobot and torchcodec; none: ours alone")
    parser.add_argument("--work", type=Path, required=True, help="where the sets lie")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--window", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cpu-seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", type=Path, help="a checkout of other code, as a third side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_measure(args)))
        return
    rows = []
    for name in args.sets:
        folder = args.work / name.replace(", ", "_").replace(" ", "")
        if not folder.exists():
            _write(args, folder, *SETS[name])
        same = _compare_pixels(args, folder) if args.lerobot else None
        for window in args.window:
            rows.append(
                {"set": name, "window": window, "same": same, **_turns(args, folder, window)}
            )
            print(json.dumps(rows[-1]), flush=True)
    _report(rows)
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1))


def _write(args: argparse.Namespace, folder: Path, codec: str, gop: int) -> None:
    pictures = args.work / "pictures.npy"
    args.work.mkdir(parents=True, exist_ok=True)
    if not pictures.exists():
        args.cache, args.shuffle = "", 0
        dataset = _mixture(args, 1).datasets[0]
        pixels = np.zeros((48, 1, 256, 256, 3), np.uint8)
        for i, out in enumerate(pixels):
            dataset.images("primary", i % len(dataset.lengths), np.array([i // 24]), out)
        np.save(pictures, pixels[:, 0])
    command = [args.lerobot, SIDE, "write", pictures, folder, "--codec", codec, "--gop", gop]
    subprocess.run([str(part) for part in command], check=True)


def _compare_pixels(args: argparse.Namespace, folder: Path) -> bool:
    """Whether both read the same pixels at some places, single frames and a span."""
    places = [*np.random.default_rng(0).integers(0, 2760, 8).tolist(), *range(100, 108)]
    file = args.work / "places.npy"
    np.save(file, places)
    command = [args.lerobot, SIDE, "load", folder, "--frames", file]
    subprocess.run([str(part) for part in command], check=True)
    theirs = np.load(file.with_suffix(".out.npy"))
    dataset = _open(folder, 1).datasets[0]
    ours = np.empty_like(theirs)
    for number, place in enumerate(places):
        for camera, role in enumerate(("primary", "wrist")):
            out = ours[number, camera][None]
            dataset.images(role, place // 120, np.array([place % 120]), out)
    return bool((ours == theirs).all())


def _turns(args: argparse.Namespace, folder: Path, window: int) -> dict[str, Any]:
    """Median of each side, and of the ratios of neighbors."""
    own = [sys.executable, str(Path(__file__).resolve()), "--worker", folder, "--work", args.work]
    own += ["--window", window, "--cpu-seconds", args.cpu_seconds]
    sides: dict[str, tuple[list[Any], Path | None]] = {"ours": (own, None)}
    if args.base:
        sides["base"] = (own, args.base.resolve())
    if args.lerobot:
        theirs = [args.lerobot, SIDE, "load", folder, "--window", window]
        sides["lerobot"] = ([*theirs, "--cpu-seconds", args.cpu_seconds], None)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, (command, base) in sides.items():
            # Of another checkout this script runs here, its package from there.
            env = os.environ | ({"VLA_JAX_BENCH_BASE": str(base)} if base else {})
            done = subprocess.run(
                [str(part) for part in command], stdout=subprocess.PIPE, check=True, env=env
            )
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    row: dict[str, Any] = {}
    for side, results in runs.items():
        row[side] = {key: statistics.median(r[key] for r in results) for key in results[0]}
    speeds = {side: [r["samples_per_cpu_s"] for r in results] for side, results in runs.items()}
    for side in sides:
        pairs = zip(speeds["ours"], speeds[side], strict=True)
        row[f"against_{side}"] = statistics.median(ours / other for ours, other in pairs)
    return row


def _report(rows: list[dict[str, Any]]) -> None:
    sides = [side for side in ("ours", "base", "lerobot") if side in rows[0]]
    head = ["set", "window", *(f"{side}, samples/CPU-s" for side in sides)]
    head += [f"against {side}" for side in sides[1:]] + [f"{side}, RSS MB" for side in sides]
    print(f"| {' | '.join([*head, 'same pixels'])} |\n{'|---' * (len(head) + 1)}|")
    for row in rows:
        cells = [row["set"], row["window"], *(f"{row[s]['samples_per_cpu_s']:.0f}" for s in sides)]
        cells += [f"{row[f'against_{side}']:.2f} x" for side in sides[1:]]
        cells += [f"{row[side]['rss_mb']:.0f}" for side in sides]
        print(f"| {' | '.join(map(str, [*cells, row['same']]))} |")


def _open(folder: Path, window: int):
    from configs.base import get_config
    from vla_jax.config import resolve

    c = get_config()
    spec_name = f"{Path(__file__).resolve()}:spec"
    c.data.update({"datasets": ({"spec": spec_name, "dir": str(folder), "weight": 1.0},)})
    c.data.cache_dir = str(folder.parent / "cache")
    c.model.structure.update({"window": window, "chunk": CHUNK, "cameras": ("primary", "wrist")})
    config = resolve(c)
    return open_datasets(config.data, config.model.structure, 7, "train")


def _measure(args: argparse.Namespace) -> dict[str, float]:
    (window,) = args.window
    ids = np.zeros(4, np.int32), np.ones(4, bool)
    loader = Loader(
        _open(args.worker, window), lambda text: ids, BATCH, seed=0, threads=THREADS, prefetch=2
    )
    for _ in range(4):
        next(loader)
    cpu, wall, samples = _cpu_seconds(), time.perf_counter(), 0
    while _cpu_seconds() - cpu < args.cpu_seconds:
        samples += len(next(loader).observation.images["primary"])
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    loader.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"samples_per_cpu_s": samples / cpu, "samples_per_s": samples / wall, "rss_mb": memory}


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
