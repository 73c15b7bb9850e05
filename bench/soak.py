"""Whether memory, descriptors and threads stay flat: a long training run, and many requests.

    python bench/soak.py --data=runs/quickstart/data/tabletop/1.0.0 --out=runs/soak
    python bench/soak.py --data=DIR --out=runs/soak --minutes=1 --requests=2000 --every=0.5

Trains configs/quickstart.py on DATA for some minutes, in a process of its own, with checkpoints and
evaluations on the way; then serves a policy of that size, in a process of its own, to some clients
that ask and come back as new sessions every 50 requests. Every few seconds OUT/train.jsonl and
OUT/serve.jsonl get a row: seconds, resident memory, descriptors, threads, and how far it is.

Flat means, of the samples behind the first third of the time, when programs are compiled and the
allocator has settled: the line through the least memory of every twentieth of that time (Theil-Sen:
the median of the slopes of all pairs) rises by no more than 1 % of their median, or 4 MB, to the
end; and the median of descriptors, and of threads, over the last third is no higher than over the
middle one. The least memory is what a process holds in any case: a step, a checkpoint and an
evaluation take a tenth more for a moment, and whether a sample meets one of them is chance.
Prints one line each and exits with 1 if one is not flat, or a process fails.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(ROOT))

from bench.serve import make_policy, observe  # noqa: E402
from eval_servers.client import PolicyClient  # noqa: E402

CLIENTS, EPISODE = 4, 50  # clients at once, requests of a session
RISE, FEW_MB = 0.01, 4.0  # share of the memory, and MB, that it may rise by
SPANS = 20  # parts of the time, of which the least memory counts


def main() -> int:
    """Train, serve, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="of the tabletop, see launch/record_demos.py")
    parser.add_argument("--out", type=Path, help="a folder that does not exist")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, 0 = none")
    parser.add_argument("--requests", type=int, default=50_000, help="0 = none")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        _serve()
        return 0
    if flags.out is None or flags.out.exists():
        parser.error("--out: name a folder that does not exist")
    if flags.minutes and not (flags.data and flags.data.is_dir()):
        parser.error("--data: name the folder of the tabletop's demonstrations")
    flags.out = flags.out.resolve()  # the processes run elsewhere
    flags.out.mkdir(parents=True)
    failed = 0
    if flags.minutes:
        failed += not train(flags)
    if flags.requests:
        failed += not serve(flags)
    return 1 if failed else 0


def train(flags: argparse.Namespace) -> bool:
    """Trains until the time is over, then asks it to leave; whether it was flat."""
    command = [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--workdir={flags.out / 'run'}",
        f"--config={ROOT / 'configs' / 'quickstart.py'}:{flags.data.resolve()}",
        "--config.train.steps=10000000", "--config.train.save_every=200",
        "--config.train.eval_every=300", f"--config.data.cache_dir={flags.out / 'cache'}",
    ]  # fmt: skip
    with open(flags.out / "train.txt", "wb") as text:
        process = subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=text)
    rows = flags.out / "run" / "log.jsonl"

    def progress() -> dict[str, Any]:
        lines = rows.read_text().splitlines() if rows.is_file() else []
        return {"step": json.loads(lines[-1]).get("step", 0)} if lines else {"step": 0}

    # The time counts from the first logged step: compilation before it is no soak.
    while process.poll() is None and not progress()["step"]:
        time.sleep(1)
    end = time.monotonic() + 60 * flags.minutes
    samples = _sample(
        process, flags.out / "train.jsonl", flags.every, lambda: time.monotonic() > end, progress
    )
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=600)
    return _judge("training", samples, f"{flags.minutes:g} minutes", code)


def serve(flags: argparse.Namespace) -> bool:
    """Serves until all requests are answered; whether it was flat."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    uri = process.stdout.readline().strip()
    answered, errors = [0] * CLIENTS, list[Exception]()

    def ask(number: int) -> None:
        try:
            for first in range(0, flags.requests // CLIENTS, EPISODE):
                with PolicyClient(uri) as client:
                    for step in range(min(EPISODE, flags.requests // CLIENTS - first)):
                        client.infer(observe(number, step))
                        answered[number] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    samples = _sample(
        process,
        flags.out / "serve.jsonl",
        flags.every,
        lambda: not any(thread.is_alive() for thread in threads),
        lambda: {"requests": sum(answered)},
    )
    process.stdin.close()
    code = process.wait(timeout=60) or len(errors)
    if errors:
        print(f"a client failed: {errors[0]!r}", file=sys.stderr)
    return _judge("serving", samples, f"{sum(answered)} requests", code)


def _serve() -> None:
    """Serves a policy of random weights until nobody listens any more."""
    from vla_jax.serve import server

    policy = make_policy(max_batch=CLIENTS)
    options = server.ServerOptions(port=0, max_sessions=2 * CLIENTS)
    with server.background(policy, options) as uri:
        print(uri, flush=True)
        sys.stdin.read()


def _sample(
    process: subprocess.Popen,
    path: Path,
    every: float,
    over: Callable[[], bool],
    progress: Callable[[], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Writes a row every few seconds until it is over or the process has ended."""
    samples, started = [], time.monotonic()
    with open(path, "w", encoding="utf-8") as file:
        while process.poll() is None and not over():
            row = {"seconds": round(time.monotonic() - started, 1), **_state(process.pid)}
            samples.append(row | progress())
            file.write(json.dumps(samples[-1]) + "\n")
            file.flush()
            time.sleep(every)
    return samples


def _state(pid: int) -> dict[str, Any]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        "rss_mb": round(int(fields["VmRSS"].split()[0]) / 1024, 2),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def rise(samples: list[dict[str, Any]]) -> float:
    """MB by which the memory rises over the samples, by the median of the slopes of all pairs."""
    slopes = [
        (b["rss_mb"] - a["rss_mb"]) / (b["seconds"] - a["seconds"])
        for a, b in combinations(samples, 2)
    ]
    return statistics.median(slopes) * (samples[-1]["seconds"] - samples[0]["seconds"])


def floor(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sample with the least memory of every `SPANS`th part of the time."""
    size = max(1, len(samples) // SPANS)
    parts = (samples[i : i + size] for i in range(0, len(samples) - size + 1, size))
    return [min(part, key=lambda row: row["rss_mb"]) for part in parts]


def flat(samples: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether the samples are flat by the rule above, and the figures."""
    if len(samples) < 9:
        return False, f"only {len(samples)} samples, too few to judge"
    third = len(samples) // 3
    middle, last = samples[third:-third], samples[-third:]
    later = floor(samples[third:])
    memory, rises = statistics.median(row["rss_mb"] for row in later), rise(later)
    peak = max(row["rss_mb"] for row in samples)
    words = [
        f"{memory:.0f} MB, rising by {rises:.2f} MB ({rises / memory:.2%}), at most {peak:.0f}"
    ]
    is_flat = rises <= max(RISE * memory, FEW_MB)
    for name in ("descriptors", "threads"):
        before, after = (statistics.median(r[name] for r in part) for part in (middle, last))
        is_flat &= after <= before
        words.append(f"{before:g} -> {after:g} {name}")
    return is_flat, ", ".join(words)


def _judge(what: str, samples: list[dict[str, Any]], how_much: str, code: int) -> bool:
    is_flat, words = flat(samples)
    ended = "" if code == 0 else f"; ended with {code}"
    print(f"{what}, {how_much}: {'flat' if is_flat else 'NOT FLAT'}: {words}{ended}", flush=True)
    return is_flat and code == 0


if __name__ == "__main__":
    sys.exit(main())
