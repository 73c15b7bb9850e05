"""The training step on this machine's accelerator beside PyTorch's and what `plan` expects of it.

    python bench/train.py --torch PYTHON --json runs/bench/train.json
    python bench/train.py --torch PYTHON --windows=1 --tiny

PYTHON is the interpreter of an environment with torch and transformers for the same device; without
it ours runs alone. The model is that of a shipped config of a policy head on Kosmos-2 (kosmos_ph:
1.7 B numbers, bfloat16 products, float32 parameters), with one batch of noise that stays on the
device. PyTorch has the same model from Hugging Face's modules under autocast, eager and by
torch.compile, each in turns with ours of some steps, so that two processes share the device's
memory and never its time. Ours draws its random crops too, theirs does not.

Printed: seconds a step and samples a second (medians of turns), MFU (3 x the forward pass's matrix
products over that time at the device's bf16 peak), peak memory, our speed over theirs, and beside
it all what `launch/plan.py --compile` says of this machine. --tiny takes a small model, on any
machine, to see that all is wired.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import fixed_step, plans
from bench.turns import Side, Turn, ratio, serve
from vla_jax.config import Config, ConfigError, load_config_file, resolve
from vla_jax.train.chips import CHIPS

THEIRS = {"torch": (), "torch compiled": ("--compile",)}
# Two processes on one device: neither may take memory before it is needed.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    """Run the pairs, ask `plan`, print one table."""
    args = _parse_args()
    try:
        config = _config(args)
    except ConfigError as error:
        sys.exit(f"train.py: {error}")
    if config.model.backbone.name != "kosmos2" or config.model.head.kind != "lstm":
        sys.exit(f"train.py: --config: {args.config}: PyTorch's side is an LSTM on Kosmos-2 alone")
    if args.worker:
        serve(fixed_step.ours(config, args.windows), args.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, config, Path(folder))
    for line in table(result):
        print(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def run(args: argparse.Namespace, config: Config, folder: Path) -> dict[str, Any]:
    """Every side's turns, in pairs with ours, and the plan.

    Args:
        args: of the command line.
        config: of the model.
        folder: for the plan's file.

    Returns:
        "windows", "steps" of a turn, "load", "rows" (see `_row`), "plan" (the JSON of
        `launch/plan.py`, or None), and "turns" as they came.
    """
    us = Side([sys.executable, __file__, "--worker", *_same(args)], SHARED)
    first = _or_exit("ours", us.answer)
    device = first["device"]
    pairs: dict[str, tuple[list[Turn], list[Turn]]] = {}
    for name, flags in THEIRS.items() if args.torch else ():
        pair = _beside(name, us, _torch(args, config, device, flags), args.rounds)
        if pair:
            pairs[name] = pair
    if not pairs:
        pairs["alone"] = ([_or_exit("ours", us.turn) for _ in range(args.rounds)], [])
    us.end()
    all_of_ours = [turn for our_turns, _ in pairs.values() for turn in our_turns]
    rows = [_row("ours", all_of_ours, first, args.windows)]
    for name, (our_turns, their_turns) in pairs.items():
        if their_turns:
            row = _row(name, their_turns, first, args.windows)
            rows.append({**row, "ours_faster": 1 / ratio(our_turns, their_turns, "wall_s")})
    return {
        "config": args.config,
        "device": device,
        "windows": args.windows,
        "steps": args.steps,
        "load": os.getloadavg(),
        "rows": rows,
        "plan": _plan(args, device, folder),
        "turns": {
            name: {"ours": our_turns, name: their_turns}
            for name, (our_turns, their_turns) in pairs.items()
        },
    }


def _beside(name: str, us: Side, them: Side, rounds: int) -> tuple[list[Turn], list[Turn]] | None:
    """Turns of ours and theirs, one after the other; None if theirs ended (out of memory)."""
    our_turns, their_turns = [], []
    try:
        them.answer()
        for _ in range(rounds):
            their_turns.append(them.turn())
            our_turns.append(_or_exit("ours", us.turn))
    except RuntimeError as error:
        print(f"train.py: {name}: {error}; see above", file=sys.stderr)
        return None
    them.end()
    return our_turns, their_turns


def _or_exit(name: str, answer: Callable[[], Turn]) -> Turn:
    try:
        return answer()
    except RuntimeError as error:
        sys.exit(f"train.py: {name}: {error}; see above")


def _torch(args: argparse.Namespace, config: Config, device: str, flags: Sequence[str]) -> Side:
    model = json.dumps(fixed_step.for_torch(config, args.windows))
    command = [args.torch, fixed_step.TORCH, "--model", model, "--steps", args.steps, *flags]
    command += ["--device", "cpu" if device == "cpu" else "cuda"]
    return Side([*command, *(["--checkpoint"] if args.checkpoint else [])])


def _row(name: str, turns: Sequence[Turn], first: Turn, windows: int) -> dict[str, Any]:
    """Medians of a side; operations and peak are those that our side told at first."""
    seconds = statistics.median(turn["wall_s"] for turn in turns)
    speed = first["flops"] / seconds
    return {
        "side": name,
        "params": turns[0]["params"],
        "step_s": seconds,
        "spread": [min(t["wall_s"] for t in turns), max(t["wall_s"] for t in turns)],
        "samples_per_s": windows / seconds,
        "tflops_per_s": speed / 1e12,
        "mfu": speed / first["peak"] if first["peak"] else None,
        "device_gb": turns[-1]["device_gb"],
        "loss": turns[-1]["loss"],
    }


def _plan(args: argparse.Namespace, device: str, folder: Path) -> dict[str, Any] | None:
    """What `launch/plan.py` expects of one such device; None for one that it does not know."""
    families = [family for family, chip in CHIPS.items() if chip.kind == device]
    # The small model has no name that it could be planned by.
    if not families or args.tiny:
        return None
    shape = "x".join("1" * (CHIPS[families[0]].rank or 1))
    flags = [f"--config={args.config}", f"--topology={families[0]}:{shape}", "--compile"]
    flags += [f"--windows={args.windows}", *(f"--config.{change}" for change in args.change)]
    file = folder / "plan.json"
    plans.run_plan(file, *flags)
    return json.loads(file.read_text()) if file.exists() else None


def table(result: dict[str, Any]) -> Iterator[str]:
    """The rows as Markdown, under a line that says what ran where."""
    yield (
        f"{result['config']} on {result['device']}, {result['windows']} windows a step, "
        f"{result['steps']} steps a turn, load {result['load'][0]:.1f}"
    )
    yield ""
    columns = "side, M numbers, s a step, least and most, samples/s, MFU, device GB, ours faster"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 8 + "|"
    for row in result["rows"]:
        faster = f"{row['ours_faster']:.2f}x" if "ours_faster" in row else ""
        yield (
            f"| {row['side']} | {row['params'] / 1e6:.1f} | {row['step_s']:.4f} "
            f"| {row['spread'][0]:.4f}, {row['spread'][1]:.4f} | {row['samples_per_s']:.2f} "
            f"| {_share(row['mfu'])} | {_gb(row['device_gb'])} | {faster} |"
        )
    plan = result["plan"]
    if plan:
        seconds, measured = plan["step_seconds"], result["rows"][0]["step_s"]
        total = plan["bytes_per_device"]["total"] / 1e9
        faster = f"{measured / seconds:.2f}x of it measured"
        yield (
            f"| plan | | {seconds:.4f} | | {result['windows'] / seconds:.2f} "
            f"| {_share(plan['mfu'])} | {_gb(total)} | {faster} |"
        )


def _share(mfu: float | None) -> str:
    return "" if mfu is None else f"{100 * mfu:.1f} %"


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"


def _config(args: argparse.Namespace) -> Config:
    raw = load_config_file(args.config, args.change)
    if args.tiny:
        raw["model"]["backbone"]["arch"] = fixed_step.kosmos2(**fixed_step.TINY)
    return resolve(raw)


def _same(args: argparse.Namespace) -> list[str | int]:
    """The flags that our own side is started with."""
    flags = ["--config", args.config, "--windows", args.windows, "--steps", args.steps]
    return [*flags, *(["--tiny"] if args.tiny else []), "--change", *args.change]


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", metavar="PYTHON", help="that has torch and transformers")
    parser.add_argument("--config", default="kosmos_ph", help="a shipped config or a file")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="of it")
    parser.add_argument("--windows", type=int, default=4, help="of a batch")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--checkpoint", action="store_true", help="PyTorch recomputes its layers")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("windows", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1, not {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
