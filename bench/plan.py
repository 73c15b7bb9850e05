"""The table of docs/scale.md: what the shipped configs take on machines that are not here.

    python bench/plan.py --out=runs/bench/plan --write=docs/scale.md
    python bench/plan.py --out=runs/bench/plan --only=h100:8

Needs the extra [plan] and, a row, a minute (GPU) to ten minutes (TPU) of one core and 1 to 4 GB of
memory. Rows whose file is in OUT already are not compiled again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import plans

MARKS = ("<!-- plan -->", "<!-- /plan -->")
# Config, topology, windows of a row block, further flags.
ROWS: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("kosmos_ph", "v5e:8x8", 4, ()),
    ("kosmos_ph", "v5e:4x4", 4, ()),
    ("kosmos_ph", "v5e:16x16", 4, ()),
    ("kosmos_ph", "v5p:4x4x4", 4, ()),
    ("kosmos_ph", "v6e:8x8", 4, ()),
    ("kosmos_ph", "h100:8", 4, ()),
    ("kosmos_ph", "h200:1", 4, ()),
    ("paligemma2_ph", "h100:8", 4, ()),
    ("qwen2_5_vl_ph", "h100:8", 2, ()),
    ("llava_ph", "h100:8", 1, ()),
    ("llava_ph", "v5e:8x8", 2, ()),
    ("flamingo_ph", "h100:8", 4, ()),
    ("kosmos_interleaved", "h100:8", 2, ("--config.model.structure.window=16",)),
    ("kosmos_interleaved", "h100:8", 2, (
        "--config.model.structure.window=16", "--config.model.dropout=False",
    )),
    ("kosmos_discrete", "h100:8", 4, (
        "--config.model.structure.window=8", "--config.model.structure.chunk=10",
    )),
    *(
        ("pi05_libero", machine, 8, flags)
        for machine in ("v5e:4x4", "v5e:8x8", "v6e:2x4", "h100:8", "h200:1")
        for flags in ((), ("--config.lora.rank=16", "--config.lora.alpha=32"))
    ),
)  # fmt: skip


def main() -> None:
    """Plan what is not planned yet, print the table, write it if asked to."""
    flags = _parse_flags()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    for config, topology, windows, more in ROWS:
        file = _file(out, config, topology, more)
        if file.exists() or flags.only not in (topology, config, ""):
            continue
        where = (f"--config={config}", f"--topology={topology}", f"--windows={windows}")
        plans.run_plan(file, *where, "--compile", *more)
    plans.show_table(lines(out), flags.write, MARKS)


def lines(out: Path) -> Iterator[str]:
    """The rows that are there, as Markdown."""
    yield (
        "| config, windows of a row block | machine | fits, GiB a device | TFLOP a device, compiled"
        " / traced | HBM GB | wire GB | bound by | step s | MFU | largest batch | control step: GB,"
        " ms |"
    )
    yield "|---" * 11 + "|"
    for config, topology, windows, more in ROWS:
        file = _file(out, config, topology, more)
        if file.exists():
            yield _line(config, windows, more, json.loads(file.read_text()))


def _line(config: str, windows: int, more: Sequence[str], plan: dict[str, Any]) -> str:
    word = "" if plan["fits"] else "**no**, "
    changed = "".join(f" `{flag.removeprefix('--config.')}`" for flag in more)
    cells = [
        f"`{config}`{changed}, {windows}",
        plan["topology"],
        f"{word}{plan['bytes_per_device']['total'] / 2**30:.2f}",
    ]
    if plan["step_seconds"]:
        cells += [
            f"{plan['flops'] / 1e12:.1f}, {plan['flops_compiled'] / plan['flops']:.3f}",
            f"{plan['hbm_bytes'] / 1e9:.0f}",
            f"{plan['wire_bytes'] / 1e9:.1f}",
            {"hbm": "HBM"}.get(plan["bound"], plan["bound"]),
            f"{plan['step_seconds']:.2f}",
            f"{100 * plan['mfu']:.0f} %",
        ]
    else:
        cells += [f"{plan['flops'] / 1e12:.1f}", *["–"] * 5]
    control = plan.get("control")
    cells.append(f"{plan['largest_batch']}")
    if control is None:
        cells.append("–")
    elif control["step_seconds"]:
        cells.append(f"{control['hbm_bytes'] / 1e9:.1f}, {1e3 * control['step_seconds']:.1f}")
    else:
        cells.append("does not fit")
    return "| " + " | ".join(cells) + " |"


def _file(out: Path, config: str, topology: str, more: Sequence[str]) -> Path:
    # What a row changes tells it from others of its config: "-window=16".
    changed = "".join(f"-{flag.rpartition('.')[2]}" for flag in more)
    return out / f"{config}-{topology.replace(':', '-').replace('*', 'x')}{changed}.json"


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/bench/plan", help="folder of the plans")
    parser.add_argument("--only", default="", help="rows of this topology or config")
    parser.add_argument("--write", help="page to write the table into")
    return parser.parse_args()


if __name__ == "__main__":
    main()
