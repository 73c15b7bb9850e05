"""What int8 leaves of the weights that a control step reads, for every backbone's policy head.

    python bench/weights.py --write=docs/benchmarks.md
    python bench/weights.py --topology h200:1 v5e:1x1 --write=docs/benchmarks.md

Counted in the traced program of `launch/serve.py`, one session on a device like this one: every
parameter that it needs, in bfloat16 and with `--weights=int8`. A table of which rows are looked up
is not read, so it is left aside and given beside. Nothing is compiled or allocated.

With topologies both programs are compiled for one device of each machine, which need not be here
(`pip install 'vla_jax[plan]'`): what their kernels read of the weights, each as often as they do,
and all they move to and from the main memory.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.interpreters import partial_eval

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import plans
from vla_jax.config import Config, load_config_file, resolve
from vla_jax.plan import compilers, machines, measured, programs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MARKS = ("<!-- weights -->", "<!-- /weights -->")
COMPILED_MARKS = ("<!-- compiled weights -->", "<!-- /compiled weights -->")
FORMS = ("bf16", "int8")
LOOKUPS = ("gather", "dynamic_slice")


def read(config: Config, form: str) -> tuple[int, int]:
    """Bytes of the parameters that a control step reads, and of the tables it looks up rows in."""
    program = programs.control_program(config, jax.local_devices()[0], 1, form)
    params = jax.tree.leaves(program.arguments[0])
    jaxpr = jax.make_jaxpr(program.step)(*program.arguments).jaxpr
    outputs = [True] * len(jaxpr.outvars)
    needed: Any = partial_eval.dce_jaxpr(jaxpr, outputs, instantiate=True)[0]
    sums = {True: 0, False: 0}
    for variable, x in zip(needed.invars, params, strict=False):  # parameters come first
        uses = set(_uses(needed, variable))
        if uses:
            sums[bool(uses - {*LOOKUPS})] += x.size * x.dtype.itemsize
    return sums[True], sums[False]


def _uses(jaxpr: Any, variable: Any) -> Iterator[str]:
    """The primitives that read a variable, through the programs that it is handed to."""
    for equation in jaxpr.eqns:
        for position, operand in enumerate(equation.invars):
            if operand is not variable:
                continue
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            inner = getattr(inner, "jaxpr", inner)
            # Calls hand their operands on one by one; a loop or a kernel reads what it is given.
            if inner is not None and len(inner.invars) == len(equation.invars):
                yield from _uses(inner, inner.invars[position])
            else:
                yield equation.primitive.name


def rows() -> Iterator[str]:
    """The table, line by line."""
    yield "| config | bfloat16, GB | int8, GB | int8 / bfloat16 | tables of words, GB | with them |"
    yield "|---|---|---|---|---|---|"
    for file in sorted(CONFIGS.glob("*_ph.py")):
        config = resolve(load_config_file(str(file)))
        (before, table), (after, kept) = (read(config, form) for form in FORMS)
        cells = [f"{before / 1e9:.2f}", f"{after / 1e9:.2f}", f"{after / before:.3f}"]
        cells += [f"{table / 1e9:.2f}", f"{(after + kept) / (before + table):.3f}"]
        yield f"| `{file.stem}` | {' | '.join(cells)} |"


def compiled_rows(topologies: list[str]) -> Iterator[str]:
    """The table of compiled programs, line by line; a cell is bfloat16, int8 (their ratio)."""
    several = [machines.parse(name) for name in topologies]
    heads = ["config"]
    for machine in several:
        # In the loops of other steps the arguments have other names.
        heads += [f"{machine.name}: weights read, GB"] * (machine.chip.platform == "cuda")
        heads.append(f"{machine.name}: all moved, GB")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for file in sorted(CONFIGS.glob("*_ph.py")):
        config, cells = resolve(load_config_file(str(file))), [f"`{file.stem}`"]
        for machine in several:
            works = [measured.control_step(config, machine, 1, form).work for form in FORMS]
            if machine.chip.platform == "cuda":
                cells.append(_cell(work.given_bytes if work else None for work in works))
            cells.append(_cell(work.hbm_bytes if work else None for work in works))
        yield f"| {' | '.join(cells)} |"


def _cell(sizes: Iterable[float | None]) -> str:
    before, after = sizes
    if before is None or after is None:
        return "refused by the compiler"
    return f"{before / 1e9:.2f}, {after / 1e9:.2f} ({after / before:.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology", nargs="+", metavar="NAME", help="compile for these machines, such as h200:1"
    )
    parser.add_argument("--write", metavar="PAGE", help="also put the table into this page")
    args = parser.parse_args()
    if args.topology:
        # Before jax starts, which would look for the devices of this machine.
        compilers.prepare()
        plans.show_table(compiled_rows(args.topology), args.write, COMPILED_MARKS)
    else:
        plans.show_table(rows(), args.write, MARKS)


if __name__ == "__main__":
    main()
