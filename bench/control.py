"""The control step of a config on this machine's device, in bfloat16 and int8, against its floor.

    python bench/control.py --config=configs/kosmos_ph.py --json runs/bench/control.json
    python bench/control.py --tiny --steps=20

The step is `launch/serve.py`'s for one robot, with random weights of the config's architecture and
pictures of noise in the model's size; a step is timed from observation to actions on the host. The
floor is what the step reads of its weights (`bench/weights.py`) over the bandwidth in the device's
data sheet: no step is quicker. Both forms take turns. --tiny takes a small model, on any machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import fixed_step
from bench.weights import FORMS, read
from vla_jax.config import Config, ConfigError, load_config_file, resolve
from vla_jax.convert.start import Start
from vla_jax.inference import weights as stored_weights
from vla_jax.inference.batched_step import BatchedStep, StepInput
from vla_jax.models import vla
from vla_jax.train.chips import CHIPS


def stepper(config: Config, form: str) -> Callable[[], float]:
    """One robot's next control step, compiled; gives its seconds."""
    model, c = vla.build(config.model, Start(config.model).arch()), config.model.structure
    maps = vla.linear_maps(model)

    def init(key: jax.Array) -> Any:
        return stored_weights.store(vla.initial_params(model, key), form, jnp.bfloat16, maps)

    # In one program, so that no copy in float32 outlives it.
    params = jax.jit(init)(jax.random.key(0))
    steps = BatchedStep(model, params, model.image, config.seed, 1)
    rng, history = np.random.default_rng(0), steps.empty
    text, mask = np.full(c.text_len, 5, np.int32), np.ones(c.text_len, bool)
    state = np.zeros(c.proprio, np.float32) if c.proprio else None
    number = 0

    def step() -> float:
        nonlocal history, number
        shape = (*model.image.shape, 3)
        images = {camera: rng.integers(0, 255, shape, dtype=np.uint8) for camera in c.cameras}
        begin = time.perf_counter()
        seen = StepInput(images, text, mask, state, history, number)
        ((_, history),) = steps.run([seen])
        number += 1
        return time.perf_counter() - begin

    for _ in range(c.window + 1):  # until the history is full, and all is compiled
        step()
    return step


def rows(config: Config, steps: int) -> Iterator[dict[str, Any]]:
    """Of each form its milliseconds and its floor; None on a device without a data sheet."""
    steppers = {form: stepper(config, form) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(steps):
        for form, step in steppers.items():
            seconds[form].append(step())
    kind = jax.devices()[0].device_kind
    bandwidth = {chip.kind: chip.bandwidth for chip in CHIPS.values()}.get(kind)
    for form in FORMS:
        weights = read(config, form)[0]
        p50, p99 = (1e3 * float(np.percentile(seconds[form], q)) for q in (50, 99))
        floor = 1e3 * weights / bandwidth if bandwidth else None
        yield {
            "weights": form, "device": kind, "gigabytes": weights / 1e9, "p50_ms": p50,
            "p99_ms": p99, "floor_ms": floor, "p50_over_floor": p50 / floor if floor else None,
        }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> Iterator[str]:
    """As Markdown."""
    yield f"on {measured[0]['device']}"
    yield "| weights | GB read | p50, ms | p99, ms | floor, ms | p50 / floor |"
    yield "|---|---|---|---|---|---|"
    for row in measured:
        figures = [f"{row[key]:.2f}" for key in ("gigabytes", "p50_ms", "p99_ms")]
        figures += [
            "–" if row[k] is None else f"{row[k]:.2f}" for k in ("floor_ms", "p50_over_floor")
        ]
        yield f"| {row['weights']} | {' | '.join(figures)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/kosmos_ph.py", help="default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="changes of the config")
    add("--steps", type=int, default=200, help="of each form (default: %(default)s)")
    add("--tiny", action="store_true", help="a small model in its place")
    add("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    try:
        raw = load_config_file(args.config, args.set)
        if args.tiny:
            raw["model"]["backbone"]["arch"] = fixed_step.kosmos2(**fixed_step.TINY)
        config = resolve(raw)
    except ConfigError as error:
        sys.exit(f"control.py: {error}")
    measured = list(rows(config, args.steps))
    print("\n".join(table(measured)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
