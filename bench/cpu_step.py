"""The train step on CPUs beside the same arithmetic in PyTorch, interleaved in one run.

    python bench/cpu_step.py --torch PYTHON --batch 1 --window 8 --json FILE

PYTHON is the interpreter of an environment with torch and transformers. Every side is a process of
its own with a mid-size Kosmos-2 policy head (vision and text 6 x 512, 107.9 M numbers, two cameras
of 224 x 224, float32) and one fixed batch; they take turns, one step at a time. Printed: medians of
the wall and the CPU time (user and system) of a step, its page faults, the peak of the resident
memory, and the medians of the ratios of neighboring steps. `--sides` names what runs: ours as
`train.keep_heap` is by default or off, with `model.remat` after a +, and torch with or without an
allocator that is tuned alike. `--decode N` lets N threads of our sides decode images and hold
batches meanwhile, as a loader does.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing

SIDES = ("kept+dots", "kept+none", "given+dots", "given+none", "torch", "torch-tuned")
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=64000000000:glibc.malloc.arena_max=1"
VISION = {"layers": 6, "width": 512, "heads": 8, "mlp": 2048}


def main() -> None:
    """Starts every side, lets them take turns, prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", help="Python with torch and transformers; none: ours alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch; XLA takes all it sees")
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(ours(args))
        return
    sides = [side for side in args.sides if args.torch or not side.startswith("torch")]
    workers = {side: _start(args, side) for side in sides}
    for worker in workers.values():  # compiled, and one step done
        _answer(worker)
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, worker in workers.items():
            print("step", file=worker.stdin, flush=True)
            turns[side].append(_answer(worker))
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    rows = [_row(side, turns, sides) for side in sides]
    _report(args, rows)
    if args.json:
        load = os.getloadavg()
        args.json.write_text(json.dumps({"load": load, "rows": rows, "turns": turns}, indent=1))


def _start(args: argparse.Namespace, side: str) -> "subprocess.Popen[str]":
    shape = ["--batch", args.batch, "--window", args.window]
    env = dict(os.environ)
    if side.startswith("torch"):
        command = [args.torch, Path(__file__).with_name("cpu_step_torch.py"), *shape]
        command += ["--threads", args.threads]
        if side == "torch-tuned":
            env["GLIBC_TUNABLES"] = TUNED
    else:
        env.setdefault("JAX_PLATFORMS", "cpu")
        command = [sys.executable, __file__, "--worker", side, *shape, "--decode", args.decode]
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def _answer(worker: "subprocess.Popen[str]") -> dict[str, float]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{worker.args}: ended with {worker.wait()}")


def _row(side: str, turns: dict[str, list[dict[str, float]]], sides: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"side": side}
    row |= {key: statistics.median(t[key] for t in turns[side]) for key in turns[side][0]}
    row["rss_mb"] = max(turn["rss_mb"] for turn in turns[side])
    for other in (name for name in sides if name.startswith("torch")):
        for key in ("wall_s", "cpu_s"):
            pairs = zip(turns[side], turns[other], strict=True)
            row[f"{key}/{other}"] = statistics.median(a[key] / b[key] for a, b in pairs)
    return row


def _report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ratios = [key for key in rows[0] if "/" in key]
    head = ["side", "wall s", "CPU s", "system s", "page faults", "peak RSS MB", *ratios]
    print(f"batch {args.batch}, window {args.window}, load {os.getloadavg()[0]:.1f}")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for r in rows:
        cells = [f"{r[key]:.2f}" for key in ("wall_s", "cpu_s", "system_s")]
        cells += [f"{r['faults']:.0f}", f"{r['rss_mb']:.0f}", *(f"{r[key]:.2f}" for key in ratios)]
        print(f"| {r['side']} | {' | '.join(cells)} |")


def serve(step: Any) -> None:
    """One step at once, then one for every line of the standard input; each prints what it took."""
    for _ in iter(lambda: _timed(step) and sys.stdin.readline(), ""):
        pass


def _timed(step: Any) -> bool:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    loss = step()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    took = {
        "wall_s": wall,
        "cpu_s": after.ru_utime - before.ru_utime + system,
        "system_s": system,
        "faults": after.ru_minflt - before.ru_minflt,
        "rss_mb": after.ru_maxrss / 1024,
        "loss": loss,
    }
    print(json.dumps(took), flush=True)
    return True


def midsize(window: int = 8) -> Any:
    """The model's config: a Kosmos-2 policy head of 107.9 M numbers in float32."""
    from configs import base

    c, v = base.get_config(), VISION
    sizes = {"patch_size": 14, "image_size": 224, "num_hidden_layers": v["layers"]}
    sizes |= {"hidden_size": v["width"], "num_attention_heads": v["heads"]}
    text = {"vocab_size": 65037, "embed_dim": v["width"], "layers": v["layers"]}
    text |= {"attention_heads": v["heads"], "ffn_dim": v["mlp"]}
    c.model.backbone.arch = {
        "latent_query_num": 64,
        "vision_config": {**sizes, "intermediate_size": v["mlp"]},
        "text_config": text,
    }
    c.model.structure.update({"window": window, "chunk": 10, "text_len": 32})
    c.model.update({"dtype": "float32", "dropout": False})
    c.data.datasets = ({"spec": "calvin", "dir": "none", "weight": 1.0},)
    return c


def ours(args: argparse.Namespace) -> Any:
    """Our own train step of the model, compiled and ready."""
    import jax
    import numpy as np

    from vla_jax.config import resolve
    from vla_jax.models import vla
    from vla_jax.train import heap, lora, state
    from vla_jax.train import mesh as meshes
    from vla_jax.train.optim import make_optimizer
    from vla_jax.train.step import make_train_step
    from vla_jax.types import Actions, Batch, Observation

    heap_setting, remat = args.worker.split("+")
    heap.limit()  # as launch/train.py does, at the same point
    if heap_setting == "kept" and not heap.keep():
        raise SystemExit("this C library cannot keep the heap")
    c = midsize(args.window)
    c.model.remat = remat
    c.train.update({"steps": 1000, "batch_size": args.batch})
    config = resolve(c)
    model, mesh = vla.build(config.model), meshes.make_mesh(config.mesh)
    initial = lora.extend(lambda key: vla.initial_params(model, key), config.lora)
    optimizer = make_optimizer(config.optim, 1000)
    template = state.abstract(initial, lora.train_rules(config), optimizer, mesh)
    current = state.create(initial, optimizer, template, 0)
    train_step = make_train_step(model, config, mesh, template, ("data",))
    rng, b, w = np.random.default_rng(0), args.batch, args.window
    cameras = config.model.structure.cameras
    shape = b, w, 224, 224, 3
    images = {camera: rng.integers(0, 255, shape, dtype=np.uint8) for camera in cameras}
    present = {camera: np.ones((b, w), bool) for camera in cameras}
    observation = Observation(
        images, present, np.full((b, 32), 5, np.int32), np.ones((b, 32), bool)
    )
    chunk = rng.uniform(-1, 1, (b, w, 10, 7)).astype(np.float32)
    actions = Actions(chunk, np.ones((b, w, 10), bool))
    batch = Batch(observation, actions, np.zeros((b, 2), np.uint32), np.zeros(b, np.int32))
    for _ in range(args.decode):
        threading.Thread(target=_decode, daemon=True).start()

    def step() -> float:
        nonlocal current
        current, metrics = train_step(current, meshes.shard_batch(batch, mesh))
        return float(jax.block_until_ready(metrics)["loss"])

    return step


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
