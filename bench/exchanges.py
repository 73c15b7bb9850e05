"""Exchanges between eight devices in a training step, beside those of another checkout.

    git worktree add ../before COMMIT
    python bench/exchanges.py --against=../before

Runs one step of launch/train.py in each checkout on eight virtual CPU devices and reads the program
that XLA compiled: how many collectives of each kind a step executes, loops multiplied, what they
send, and the largest. The CPU's compiler splits a step by the same shardings as those of TPUs and
GPUs, but overlaps and combines less: counts compare checkouts, not machines. The model is
`bridge_smoke`'s with four windows of history and layers enough to see a loop. Flags after -- go to
both runs.
"""

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vla_jax.plan import compiled  # noqa: E402 - a script runs without being installed

DEVICES = 8
MESH = {"data": 1, "fsdp": DEVICES, "tensor": 1}
ARCH = "--config.model.backbone.arch."
MODEL = (
    "--config.model.structure.window=4", "--config.model.remat=full",
    f"{ARCH}vision_config.num_hidden_layers=4", f"{ARCH}text_config.layers=4",
)  # fmt: skip


def main() -> None:
    """Compile both, print both."""
    flags = _parse_flags()
    for name, checkout in (("here", ROOT), ("there", flags.against)):
        if checkout is not None:
            _show(name, _work(checkout, flags.train))


def _work(checkout: Path, flags: list[str]) -> compiled.Work:
    with tempfile.TemporaryDirectory() as folder:
        dump, data = Path(folder) / "dump", Path(folder) / "bridge_dataset" / "1.0.0"
        # An index is written beside the data.
        shutil.copytree(ROOT / "tests" / "fixtures" / "bridge_dataset" / "1.0.0", data)
        done = subprocess.run(
            [
                sys.executable, "launch/train.py", f"--config=configs/bridge_smoke.py:{data}",
                f"--workdir={folder}/run", "--config.train.steps=1", "--config.train.eval_every=0",
                *MODEL, *flags,
            ],
            cwd=checkout, capture_output=True, text=True,
            env={
                **os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu",
                # A program out of a cache is not compiled, and leaves no text.
                "JAX_ENABLE_COMPILATION_CACHE": "false",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"
                f" --xla_dump_to={dump} --xla_dump_hlo_as_text",
            },
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{checkout}: {done.stderr[-3000:]}")
        # The longest is the training step; the others are those of evaluating.
        texts = dump.glob("*jit_*step*after_optimizations.txt")
        step = max(texts, key=lambda file: file.stat().st_size)
        return compiled.read(step.read_text(), MESH, [0] * DEVICES)


def _show(name: str, work: compiled.Work) -> None:
    executions = collections.Counter[str]()
    for each in work.exchanges:
        executions[each.kind] += each.executions
    counts = ", ".join(f"{kind} {number}" for kind, number in sorted(executions.items()))
    print(f"{name}: {counts}; {work.wire_bytes / 1e6:.1f} MB sent by a device")
    for each in sorted(work.exchanges, key=lambda each: -each.wire_bytes)[:3]:
        size = f"{each.wire_bytes / 1e6:.1f} MB"
        print(f"  {each.kind} of {each.array}, {each.executions} times: {size}")


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="DIR", help="the other checkout")
    parser.add_argument("train", nargs="*", help="flags for both runs, after --")
    flags = parser.parse_args()
    flags.against = flags.against and flags.against.resolve()
    return flags


if __name__ == "__main__":
    main()
