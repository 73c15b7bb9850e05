"""What a control step of an expert (pi0, pi0.5, SmolVLA) reads, counted in the traced program.

    python bench/denoising.py pi05_libero

Nothing is compiled or allocated. Parameters are counted in bfloat16: once for all that stands
before the loop over denoising steps, once a step for all that stands in it; the table of words is
not counted, of which a few rows are read. No chip is quicker than its memory gives that out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax.config import ModelConfig, load_config_file, resolve
from vla_jax.models import vla
from vla_jax.rules import flatten, unflatten
from vla_jax.train.chips import CHIPS
from vla_jax.types import Observation

TABLE = "backbone/text/embed"


class Reads(NamedTuple):
    """What one control step of one robot reads.

    Attributes:
        before: paths of the parameters that are read before the loop.
        inside: paths of those that are read at every denoising step.
        kept: bytes that the loop reads at every step besides, made before it.
        sizes: bytes of every parameter in bfloat16.
        steps: of denoising.
    """

    before: tuple[str, ...]
    inside: tuple[str, ...]
    kept: int
    sizes: dict[str, int]
    steps: int

    @property
    def total(self) -> int:
        """Bytes of a control step."""
        once = sum(self.sizes[path] for path in self.before if not path.startswith(TABLE))
        return once + self.steps * (sum(self.sizes[path] for path in self.inside) + self.kept)


def reads(config: ModelConfig) -> Reads:
    """Trace the sampling of one robot's chunk."""
    model: Any = vla.build(config)
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    flat = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in flatten(tree).items()
    }
    noise = jax.ShapeDtypeStruct(
        (1, model.config.structure.chunk, model.config.expert.padded), "f4"
    )

    def sample(flat: Any, seen: Observation, start: Any) -> Any:
        return model.apply({"params": unflatten(flat)}, seen, start, method="sample")

    traced: Any = jax.make_jaxpr(sample)(flat, observation(model), noise).jaxpr
    # Loops are traced with all parameters of a module, of which a compiler drops what is not read.
    all_outputs = [True] * len(traced.outvars)
    needed: Any = partial_eval.dce_jaxpr(traced, all_outputs, instantiate=True)[0]
    paths = dict(zip(map(id, needed.invars), sorted(flat), strict=False))
    (loop,) = (
        equation
        for equation in needed.eqns
        if equation.primitive.name == "scan"
        and equation.params["length"] == model.config.head.sampling_steps
        and any(len(variable.aval.shape) == 3 for variable in equation.outvars)
    )
    inside = tuple(paths[id(v)] for v in loop.invars if id(v) in paths)
    stored_avals = [v.aval for v in loop.invars if id(v) not in paths and not hasattr(v, "val")]
    before = {
        paths[id(v)]
        for equation in needed.eqns
        if equation is not loop
        for v in equation.invars
        if id(v) in paths
    }
    sizes = {path: 2 * int(np.prod(leaf.shape)) for path, leaf in flat.items()}
    stored = sum(int(np.prod(aval.shape)) * aval.dtype.itemsize for aval in stored_avals)
    return Reads(tuple(sorted(before)), inside, stored, sizes, model.config.head.sampling_steps)


def observation(model: Any) -> Observation:
    """One robot's, as shapes."""
    s, side = model.config.structure, model.image.size
    shape = jax.ShapeDtypeStruct
    return Observation(
        images={name: shape((1, 1, side, side, 3), jnp.bfloat16) for name in s.cameras},
        image_mask={name: shape((1, 1), bool) for name in s.cameras},
        text=shape((1, s.text_len), jnp.int32),
        text_mask=shape((1, s.text_len), bool),
        proprio=shape((1, 1, s.proprio), jnp.float32) if s.proprio else None,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    flags = parser.parse_args()
    counted = reads(resolve(load_config_file(flags.config, flags.set)).model)
    step = sum(counted.sizes[path] for path in counted.inside)
    print(f"parameters {sum(counted.sizes.values()) / 1e9:.2f} GB; {counted.steps} denoising steps")
    print(f"a denoising step: parameters {step / 1e6:.0f} MB, kept {counted.kept / 1e6:.1f} MB")
    print(f"a control step: {counted.total / 1e9:.2f} GB")
    for name, chip in CHIPS.items():
        print(f"{name}: at least {1e3 * counted.total / chip.bandwidth:.1f} ms")


if __name__ == "__main__":
    main()
