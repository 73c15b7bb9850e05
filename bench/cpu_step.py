"""The train step or the control step on CPUs beside PyTorch's of the same arithmetic, in turns.

    python bench/cpu_step.py --torch PYTHON --batch 1 --window 8 --json FILE
    python bench/cpu_step.py --torch PYTHON --control --rounds 15

PYTHON is the interpreter of an environment with torch and transformers. Every side is a process of
its own with a mid-size Kosmos-2 policy head (vision and text 6 x 512, 107.9 M numbers, two cameras
of 224 x 224, float32) and one fixed batch; they take turns, one step at a time. Printed: medians of
the wall and the CPU time (user and system) of a step, its page faults, the peak of the resident
memory, and the medians of the ratios of neighboring steps. `--sides` names what runs: ours as
`train.keep_heap` is by default or off, with `model.remat` after a +, and torch with or without an
allocator that is tuned alike. `--decode N` lets N threads of our sides decode images and hold
batches meanwhile, as a loader does. With `--control` every side answers one robot's observations
instead, in float32, ours from images to actions in the robot's units as behind a server.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import serve
from bench.turns import Side, Turn, ratio
from bench.turns import serve as answer

HEAPS, REMAT = ("kept", "given"), ("dots", "none", "full")
CONTROL = (*HEAPS, "torch", "torch-tuned")
SIDES = (*(f"{heap}+{remat}" for heap in HEAPS for remat in REMAT), "torch", "torch-tuned")
SAVE = "save"  # the worker that writes the policy of the control step
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=64000000000:glibc.malloc.arena_max=1"


def main() -> None:
    """Starts every side, lets them take turns, prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", help="Python with torch and transformers; none: ours alone")
    parser.add_argument("--sides", nargs="+", choices=(*HEAPS, *SIDES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--control", action="store_true", help="control steps, no training")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--threads", type=int, default=2, help="of torch; XLA takes all it sees")
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(args)
        return
    choices = CONTROL if args.control else SIDES
    sides = args.sides or choices
    if not set(sides) <= set(choices):
        parser.error(f"--sides: the choices here are {', '.join(choices)}")
    names = [side for side in sides if args.torch or not side.startswith("torch")]
    with tempfile.TemporaryDirectory() as folder:
        if args.control:
            # In a process of its own, for a child's peak is at least its parent's.
            command = [sys.executable, __file__, "--worker", SAVE, "--checkpoint", folder]
            subprocess.run(command, check=True)
        workers = {name: _start(args, name, folder) for name in names}
        try:
            for side in workers.values():  # compiled, and one turn done
                side.answer()
            turns: dict[str, list[Turn]] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name, side in workers.items():
                    turns[name].append(side.turn())
        except RuntimeError as error:
            sys.exit(f"cpu_step.py: a side {error}")
        for side in workers.values():
            side.end()
    rows = [_row(name, turns) for name in names]
    _report(args, rows)
    if args.json:
        load = os.getloadavg()
        args.json.write_text(json.dumps({"load": load, "rows": rows, "turns": turns}, indent=1))


def _start(args: argparse.Namespace, name: str, checkpoint: str) -> Side:
    """A side; `checkpoint` holds the policy of our control step."""
    steps = ["--steps", args.steps, *(["--control"] if args.control else [])]
    if not name.startswith("torch"):
        command = [sys.executable, __file__, "--worker", name, "--batch", args.batch]
        command += ["--window", args.window, "--decode", args.decode, *steps]
        command += ["--checkpoint", checkpoint]
        return Side(command, {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")})
    # jax is loaded here for the model's sizes alone.
    from bench import fixed_step
    from vla_jax.config import resolve

    model = fixed_step.for_torch(resolve(fixed_step.midsize(args.window)), args.batch)
    command = [args.torch, fixed_step.TORCH, "--threads", args.threads]
    command += ["--model", json.dumps(model), *steps]
    return Side(command, {"GLIBC_TUNABLES": TUNED} if name == "torch-tuned" else {})


def _row(name: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    row: dict[str, Any] = {"side": name}
    keys = ("wall_s", "cpu_s", "system_s", "faults")
    row |= {key: statistics.median(turn[key] for turn in turns[name]) for key in keys}
    row["rss_mb"] = max(turn["rss_mb"] for turn in turns[name])
    for other in (side for side in turns if side.startswith("torch")):
        for key in ("wall_s", "cpu_s"):
            row[f"{key}/{other}"] = ratio(turns[name], turns[other], key)
    return row


def _report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ratios = [key for key in rows[0] if "/" in key]
    head = ["side", "wall s", "CPU s", "system s", "page faults", "peak RSS MB", *ratios]
    what = "control step" if args.control else f"batch {args.batch}, window {args.window}"
    print(f"{what}, load {os.getloadavg()[0]:.1f}")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for r in rows:
        cells = [f"{r[key]:.3f}" for key in ("wall_s", "cpu_s", "system_s")]
        cells += [f"{r['faults']:.0f}", f"{r['rss_mb']:.0f}", *(f"{r[key]:.2f}" for key in ratios)]
        print(f"| {r['side']} | {' | '.join(cells)} |")


def _work(args: argparse.Namespace) -> None:
    """One of our sides, or what it needs."""
    from bench import fixed_step
    from vla_jax.config import resolve
    from vla_jax.train import heap

    if args.worker == SAVE:
        serve.save(args.checkpoint, "midsize")
        return
    heap_setting, _, remat = args.worker.partition("+")
    heap.limit()  # as launch/train.py does, at the same point
    if heap_setting == "kept" and not heap.keep():
        sys.exit("this C library cannot keep the heap")
    if args.control:
        step = fixed_step.control(args.checkpoint)
    else:
        c = fixed_step.midsize(args.window)
        c.model.remat = remat
        step = fixed_step.ours(resolve(c), args.batch)
    for _ in range(args.decode):
        threading.Thread(target=_decode, daemon=True).start()
    answer(step, args.steps)


def _decode() -> None:
    """What a loader's thread does: decoded images, in batches that live for a few steps."""
    import numpy as np
    import simplejpeg

    from vla_jax.data.buffers import BufferPool

    rng = np.random.default_rng(threading.get_ident() % 1000)
    pixels = rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)
    encoded, pool, ready = simplejpeg.encode_jpeg(pixels, 90), BufferPool((32, 8, 224, 224, 3)), []
    while True:
        images = pool.take()
        for row in images.reshape(-1, 224, 224, 3):
            row[...] = simplejpeg.decode_jpeg(encoded)
            time.sleep(0.002)
        ready = [*ready[-2:], (images, {i: bytes(i) for i in range(1000)})]


if __name__ == "__main__":
    main()
