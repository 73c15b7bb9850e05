"""The table of docs/scale.md for single machines: which config fits which GPU, and for how long.

    python bench/gpus.py --out=runs/bench/gpus --write=docs/scale.md

Every row is one `launch/plan.py --compile`: with the extra [plan] a few minutes of a core, and no
GPU. With --traced it is planned without a compiler, in seconds: memory is the least that it can be
then, and the time that of the operations alone. Rows whose file is in OUT are not planned again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import plans
from vla_jax.plan import machines
from vla_jax.plan.compiled import EFFICIENCY

MARKS = ("<!-- gpus -->", "<!-- /gpus -->")
STEPS = 10_000  # that the hours are of
TRACED = "-traced"


class Row(NamedTuple):
    """One recipe on one machine.

    Attributes:
        about: what it is, in a few words.
        config: name of the shipped config.
        topology: machine, as for `launch/plan.py`.
        batch: windows a step.
        flags: what is changed of the config, without `--config.`.
    """

    about: str
    config: str
    topology: str
    batch: int
    flags: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of its plan."""
        changed = [flag.rpartition(".")[2].replace("=", "_") for flag in self.flags]
        return "-".join([self.config, self.topology.replace(":", "x"), str(self.batch), *changed])


LORA = ("lora.rank=16", "lora.alpha=32.0")
ROWS = (
    Row("Kosmos-2, LoRA", "finetune", "rtx4090:1", 16),
    Row("Kosmos-2, LoRA", "finetune", "l4:1", 8),
    Row("SmolVLM2-500M, LoRA", "finetune", "rtx4090:1", 16, ("model.backbone.name=smolvlm",)),
    Row("PaliGemma 3B, LoRA", "finetune", "rtx4090:1", 8, ("model.backbone.name=paligemma",)),
    Row("Qwen2.5-VL 3B, LoRA", "finetune", "rtx4090:1", 4, ("model.backbone.name=qwen2_5_vl",)),
    Row("SmolVLA, expert alone", "smolvla", "rtx4090:1", 64),
    Row("pi0, LoRA", "pi0_libero", "rtx4090:1", 8, LORA),
    Row("pi0.5, LoRA", "pi05_libero", "rtx4090:1", 8, LORA),
    Row("Kosmos-2, all of it", "kosmos_ph", "h100:1", 4),
    Row("Kosmos-2, all of it", "kosmos_ph", "a100:8", 32),
    Row("PaliGemma 2 3B, all of it", "paligemma2_ph", "h100:8", 32),
    Row("LLaVA 7B, LoRA", "llava_ph", "h100:1", 4, LORA),
    Row("pi0, all of it", "pi0_libero", "h100:8", 32),
    Row("pi0.5, all of it", "pi05_libero", "h100:8", 256),
)


def main() -> None:
    """Plan what is not planned yet, print the table, write it if asked to."""
    flags = _parse_flags()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        file = out / f"{row.file}{TRACED if flags.traced else ''}.json"
        if file.exists() or flags.only not in row.file:
            continue
        where = (f"--config={row.config}", f"--topology={row.topology}")
        changed = (f"--config.{flag}" for flag in (f"train.batch_size={row.batch}", *row.flags))
        plans.run_plan(file, *where, *changed, *(() if flags.traced else ("--compile",)))
    plans.show_table(lines(out), flags.write, MARKS)


def lines(out: Path) -> Iterator[str]:
    """The rows that are there, as Markdown."""
    yield "| what | config and what is changed | GPU | batch | GiB a device | s a step | hours |"
    yield "|---" * 7 + "|"
    for row in ROWS:
        for name in (f"{row.file}.json", f"{row.file}{TRACED}.json"):
            if (out / name).exists():
                yield _line(row, json.loads((out / name).read_text()))
                break


def _line(row: Row, plan: dict[str, Any]) -> str:
    gib, seconds, least = plan["bytes_per_device"]["total"] / 2**30, plan["step_seconds"], ""
    if plan["fits"] is None:
        # Without a compiler all figures are bounds: nothing but the operations is counted.
        least, chip = "≥ ", machines.parse(row.topology).chip
        seconds = plan["flops"] / chip.flops / EFFICIENCY
    memory, time = f"{least}{gib:.1f}", ["–", "–"]
    if plan["fits"] is False:
        largest = plan["largest_batch"]
        memory = f"**does not fit**: {gib:.1f}" + (f"; a batch of {largest} would" * bool(largest))
    elif seconds:
        time = [f"{least}{seconds:.2f}", f"{least}{seconds * STEPS / 3600:.1f}"]
    recipe = " ".join([f"`{row.config}`", *(f"`{flag}`" for flag in row.flags)])
    return f"| {' | '.join([row.about, recipe, row.topology, str(row.batch), memory, *time])} |"


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/bench/gpus", help="folder of the plans")
    parser.add_argument("--only", default="", help="rows whose file's name has this in it")
    parser.add_argument("--traced", action="store_true", help="without a compiler")
    parser.add_argument("--write", help="page to write the table into")
    return parser.parse_args()


if __name__ == "__main__":
    main()
