"""Indexing, opening and loading with this checkout beside another one, in one interleaved run.

    git worktree add ../base COMMIT
    python bench/overhead.py --base=../base --data=DIR

DIR holds bridge_dataset/1.0.0. The two checkouts take turns in processes of their own, whose
order changes from round to round, so that what else the machine does meets both alike. Figures are
CPU seconds (user + system) of the process with all its threads, since wall time depends on the
neighbors, after one unmeasured turn that loads what is loaded lazily:

    index    the byte index of the training split, from nothing
    reopen   the same, when it is there
    open     all that a run opens: index, standardized actions, statistics; from nothing
    loader   samples a CPU-second, from threads that decode windows

The ratio is ours over the other's: the median over the rounds of each round's own. Exits with 1 if
indexing, or opening, takes more than 1.15 of the other's, or the loader makes less than 0.97.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATASET = "bridge_dataset"
LOW = ["steps/action", "steps/language_instruction", "steps/observation/state"]
# Ratios that may not be crossed: times at most, samples a CPU-second at least.
MOST = {"index": 1.15, "reopen": 1.15, "open": 1.15}
LEAST = {"loader": 0.97}
INDEXED, OPENED = 12, 3  # turns of a round: opening from nothing takes much longer than indexing


def main() -> int:
    """Run both checkouts in turns, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, help="the other checkout")
    parser.add_argument("--data", type=Path, required=True, help="holds bridge_dataset/1.0.0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--cpu-seconds", type=float, default=4.0, help="of the loader, a round")
    parser.add_argument("--scratch", type=Path, help="where indices are made; default: a temporary")
    parser.add_argument("--json", type=Path, help="also write every round here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_measure(args)))
        return 0
    if args.base is None or not (args.base / "vla_jax").is_dir():
        parser.error("--base: name a checkout to compare with")
    checkouts = {"ours": ROOT, "base": args.base.resolve()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(args.rounds):
        names = list(checkouts) if number % 2 else list(checkouts)[::-1]
        for name in names:
            rounds[name].append(_run(args, checkouts[name]))
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1), encoding="utf-8")
    return _report(rounds)


def _run(args: argparse.Namespace, checkout: Path) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"--data={args.data}"]
    command += [f"--window={args.window}", f"--cpu-seconds={args.cpu_seconds}"]
    command += [f"--scratch={args.scratch}"] if args.scratch else []
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _report(rounds: dict[str, list[dict[str, float]]]) -> int:
    print(f"| what | base | ours | ours / base, median of {len(rounds['ours'])} | bar |")
    print("|---|---|---|---|---|")
    missed = 0
    for measure in rounds["ours"][0]:
        ours, base = ([row[measure] for row in rounds[name]] for name in ("ours", "base"))
        ratio = statistics.median(a / b for a, b in zip(ours, base, strict=True))
        bad = ratio > MOST.get(measure, ratio) or ratio < LEAST.get(measure, ratio)
        bar = f"<= {MOST[measure]}" if measure in MOST else f">= {LEAST[measure]}"
        shown = [statistics.median(base), statistics.median(ours)]
        scale, unit = (1e3, "ms") if measure in MOST else (1, "samples/CPU-s")
        low, high = (f"{scale * value:.2f}" for value in shown)
        print(f"| {measure} ({unit}) | {low} | {high} | {ratio:.3f} | {bar}{' MISSED' * bad} |")
        missed += bad
    return 1 if missed else 0


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """All four in this process, with the checkout that PYTHONPATH names."""
    try:
        from vla_jax.data.rlds.index import open_index
    except ImportError:  # a checkout from before the readers had folders
        from vla_jax.data.rlds_index import open_index  # type: ignore[import-not-found]
    folder = args.data / DATASET / "1.0.0"
    index, reopen = [], []
    for _ in range(INDEXED + 1):
        cache = tempfile.mkdtemp(dir=args.scratch)
        for times in (index, reopen):
            times.append(_cpu(lambda c=cache: open_index(folder, "train", LOW, c)))
        shutil.rmtree(cache)
    opening: list[float] = []
    for _ in range(OPENED + 1):
        cache = tempfile.mkdtemp(dir=args.scratch)
        config = _config(args, cache)
        opening.append(_cpu(lambda c=config: _open(c)))
        shutil.rmtree(cache)
    with tempfile.TemporaryDirectory(dir=args.scratch) as cache:
        loader = _samples_per_cpu_second(args, cache)
    times = {"index": index, "reopen": reopen, "open": opening}
    # The first turn also loads modules; of the others the best one is the least disturbed.
    return {measure: min(seconds[1:]) for measure, seconds in times.items()} | {"loader": loader}


def _cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of `work` and of the threads that it leaves behind, all of them ended."""
    before, started = set(threading.enumerate()), time.process_time()
    work()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=1)  # progress bars keep one thread for good
    return time.process_time() - started


def _config(args: argparse.Namespace, cache: str) -> Any:
    """Made before the clock starts: a config's keys are no part of opening data."""
    from configs.base import get_config
    from vla_jax.config import resolve

    c = get_config()
    folder = str(args.data / DATASET / "1.0.0")
    c.data.update({"datasets": ({"spec": DATASET, "dir": folder, "weight": 1.0},)})
    c.data.cache_dir = cache
    c.model.structure.update({"window": args.window, "chunk": 10, "cameras": ("primary",)})
    return resolve(c)


def _open(config: Any) -> Any:
    from vla_jax.data.loader import open_datasets

    return open_datasets(config.data, config.model.structure, 7, "train")


def _samples_per_cpu_second(args: argparse.Namespace, cache: str) -> float:
    from vla_jax.data.loader import Loader

    text = np.zeros(32, np.int32), np.ones(32, bool)
    mixture = _open(_config(args, cache))
    batches = iter(Loader(mixture, lambda _: text, 32, seed=0, threads=2, prefetch=2))
    for _ in range(4):  # starts the threads
        next(batches)
    started, samples = time.process_time(), 0
    while time.process_time() - started < args.cpu_seconds:
        samples += len(next(batches).observation.images["primary"])
    return samples / (time.process_time() - started)


if __name__ == "__main__":
    sys.exit(main())
