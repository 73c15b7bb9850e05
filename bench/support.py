"""Every backbone x structure x head: trained a little, or refused with the reason.

    python bench/support.py --out runs/support.json --write docs/support.md

A cell is the tiny architecture of configs/tiny.py on one random batch: the loss, averaged over
eight draws of the head's noise that training does not see, before and after 20 steps of Adam. The
table says how much of it is left; a cell that does not fall below 95 % fails. Cells that OUT holds
are not run again. With --write the table replaces what stands between a file's `support` marks.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import tiny
from vla_jax import progress
from vla_jax.config import resolve
from vla_jax.models import legality, vla
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import STRUCTURES
from vla_jax.types import Actions, Observation

STEPS, RATE, LEFT = 20, 3e-3, 0.95
MARKS = ("<!-- support -->", "<!-- /support -->")


def build(backbone: str, structure: str, head: str) -> vla.VLA:
    """The cell's model."""
    raw = tiny.get_config(backbone).model
    spliced = BACKBONES[backbone].LAYOUT.images == "spliced"
    stepwise = structure in ("one_step", "expert", "parallel") or head == "fast"
    single = stepwise or (structure == "discrete" and not spliced)
    window = 1 if single else 3
    raw.structure.update({"kind": structure, "window": window, "chunk": 2, "text_len": 9})
    raw.head.update({"kind": head, "hidden": 16, "layers": 1, "heads": 2, "bins": 20})
    raw.head.sampling_steps = 4
    raw.expert.update({"width": 16, "hidden": 16, "padded": 8, "prompt": "pi0"})
    raw.fast.update({"prompt": "pi0", "length": 6, "images": "backbone"})
    config = tiny.get_config(backbone)
    config.model = raw
    return vla.build(resolve(config).model)


def batch(model: vla.VLA, rows: int = 2) -> tuple[Observation, Actions]:
    """Random windows."""
    rng, s = np.random.default_rng(0), model.config.structure
    shape = (rows, s.window)
    images = {c: rng.normal(size=(*shape, *model.image.shape, 3)) for c in s.cameras}
    chunk = rng.uniform(-1, 1, (*shape, s.chunk, model.config.action_dim))
    chunk[..., -1] = chunk[..., -1] > 0
    observation = Observation(
        images={c: jnp.asarray(x, jnp.float32) for c, x in images.items()},
        image_mask={c: jnp.ones(shape, bool) for c in images},
        text=jnp.asarray(rng.integers(5, 100, (rows, s.text_len)), jnp.int32),
        text_mask=jnp.arange(s.text_len) < jnp.array([[7], [9]]),
    )
    mask = jnp.ones((*shape, s.chunk), bool)
    count, written = vla.written(model.config), None
    if count:
        written = jnp.asarray(rng.integers(5, 100, (rows, count)), jnp.int32)
    return observation, Actions(jnp.asarray(chunk, jnp.float32), mask, written)


def train(model: vla.VLA) -> tuple[float, float]:
    """The loss before and after."""
    inputs, optimizer = batch(model), optax.scale_by_adam()

    @jax.jit  # once: compiling is what a cell costs
    def step(params: Any, state: Any, key: Any, rate: Any) -> Any:
        def loss(params: Any) -> Any:
            return model.apply({"params": params}, *inputs, key, 0.1, method="loss")[0]

        total, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, total

    params = jax.jit(lambda key: vla.initial_params(model, key))(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    held = jax.random.split(jax.random.key(7), 8)

    def measure() -> float:
        return float(np.mean([float(step(params, state, key, 0.0)[2]) for key in held]))

    before = measure()
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, _ = step(params, state, key, RATE)
    return before, measure()


def markdown(results: dict[str, Any]) -> str:
    """A row for each backbone and structure, a column for each head, then the reasons."""
    heads = list(HEADS)
    lines = ["| backbone | structure | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 2) + "|")
    reasons: dict[str, int] = {}
    for backbone, structure in itertools.product(tiny.ARCHS, STRUCTURES):
        cells = []
        for head in heads:
            if reason := legality.refusal(backbone, structure, head):
                cells.append(f"[{reasons.setdefault(reason, len(reasons) + 1)}]")
            else:
                before, after = results[f"{backbone}/{structure}/{head}"]
                cells.append(f"{after / before:.0%}")
        lines.append(f"| {backbone} | {structure} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{n}] {reason}.  " for reason, n in reasons.items())]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/support.json", help="default: %(default)s")
    parser.add_argument("--write", help="file whose table is replaced")
    parser.add_argument("--only", nargs="+", choices=list(tiny.ARCHS), help="backbones")
    flags = parser.parse_args()
    out = Path(flags.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    cells = itertools.product(flags.only or tiny.ARCHS, STRUCTURES, HEADS)
    wanted = [
        cell for cell in cells if not legality.refusal(*cell) and "/".join(cell) not in results
    ]
    for cell in progress.bar(wanted, unit="cell"):
        results["/".join(cell)] = train(build(*cell))
        _write(out, json.dumps(results, indent=1))
    failed = [name for name, (before, after) in results.items() if not after < LEFT * before]
    if failed:
        sys.exit(f"the loss did not fall: {failed}")
    if flags.only:
        return
    table = markdown(results)
    print(table)
    if flags.write:
        path = Path(flags.write)
        before, _, remaining = path.read_text().partition(MARKS[0])
        _, closing, after = remaining.partition(MARKS[1])
        if not closing:
            sys.exit(f"{path}: has no {MARKS[0]} ... {MARKS[1]}")
        _write(path, f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
