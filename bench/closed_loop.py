"""Backbones, or structures and heads, side by side: each trained, served and evaluated.

    python bench/closed_loop.py backbones --data runs/quickstart/data/tabletop/1.0.0
    python bench/closed_loop.py structures --data DATA --only lstm flow

Every row is `launch/demo.py` on the tabletop world with the same demonstrations, steps, batch and
episodes. `backbones` are those of configs/tiny.py, a hundred steps each, to see that all is wired;
`structures` are variants of configs/quickstart.py with the demo's own budget. What OUT holds
already is not run again. Prints a Markdown table and writes it to OUT/table.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import tiny

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "configs/quickstart.py"
_S, _H = "--config.model.structure.", "--config.model.head."
_ONE = (f"{_S}kind=one_step", f"{_S}window=1")
_TRANSFORMER = (f"{_H}hidden=128", f"{_H}layers=2", f"{_H}heads=4")
# row -> config, flags of launch/train.py
Rows = dict[str, tuple[str, tuple[str, ...]]]
# row -> flags, of those on the quickstart's config
STRUCTURES: dict[str, tuple[str, ...]] = {
    "lstm": (),
    "lstm, W = 1": (f"{_S}window=1",),
    "lstm, W = 8": (f"{_S}window=8",),
    "gpt2": (f"{_H}kind=gpt2", *_TRANSFORMER),
    "mlp, one step": (*_ONE, f"{_H}kind=mlp"),
    "mlp, interleaved": (f"{_S}kind=interleaved", f"{_H}kind=mlp"),
    # Its prompt is longer, and words and actions share the vocabulary.
    "discrete, one step": (
        *(f"{_S}kind=discrete", f"{_S}window=1", f"{_S}text_len=24"),
        *(f"{_H}kind=detokenizer", f"{_H}bins=64"),
        "--config.model.backbone.arch.text_config.vocab_size=192",
    ),
    "diffusion": (f"{_H}kind=diffusion", *_TRANSFORMER),
    "flow": (f"{_H}kind=flow", *_TRANSFORMER),
}
_E, _F = "--config.model.expert.", "--config.model.fast."
# FAST tokens stand above the words; {fast} is the folder of their tokenizer.
_FAST = (_F + "dir={fast}", f"{_F}length=32")
_BESIDE = ("--config.model.backbone.arch.text_config.vocab_size=384", f"{_E}fast_weight=1")
# rows on PaliGemma
TODAY: Rows = {
    "expert": ("configs/quickstart_expert.py", ()),
    "expert, FAST": ("configs/quickstart_expert.py", (*_BESIDE, *_FAST)),
    "expert, insulated": ("configs/quickstart_expert.py", (f"{_E}insulate=True",)),
    "expert, insulated, FAST": (
        "configs/quickstart_expert.py",
        (f"{_E}insulate=True", *_BESIDE, *_FAST),
    ),
    "discrete, FAST": ("configs/quickstart_fast.py", _FAST),
}


def main() -> None:
    """Command line."""
    flags = _parse_flags()
    backbones = flags.what == "backbones"
    rows: Rows = {name: (f"configs/tiny.py:{name}", ()) for name in tiny.ARCHS}
    if not backbones:
        rows = {name: (QUICKSTART, train) for name, train in STRUCTURES.items()} | TODAY
    wanted = flags.only or list(rows)
    if unknown := sorted(set(wanted) - set(rows)):
        sys.exit(f"--only: {unknown} are none of {list(rows)}")
    steps = flags.steps or (100 if backbones else 2500)
    episodes = flags.episodes or (13 if backbones else 130)
    done = []
    for name in wanted:
        run = Path(flags.out) / flags.what / name.replace(", ", "_").replace(" ", "")
        if not (run / "report" / "score.json").is_file():
            config, train = rows[name]
            command = [sys.executable, "launch/demo.py", "--no-baselines", f"--config={config}"]
            command += [f"--workdir={run}", f"--data={flags.data}", f"--episodes={episodes}"]
            fast = str(_fast_tokens(flags)) if _FAST[0] in train else ""
            train = [word.replace("{fast}", fast) for word in train]
            command += ["--", f"--config.train.steps={steps}", *train, *flags.train]
            subprocess.run(command, cwd=ROOT, check=True)
        done.append(_row(name, run))
    table = _markdown(done)
    (Path(flags.out) / flags.what / "table.md").write_text(table)
    print(table)


def _fast_tokens(flags: argparse.Namespace) -> Path:
    """The folder of a FAST tokenizer that is fitted on the demonstrations."""
    out = (Path(flags.out) / "fast").absolute()
    if not out.is_dir():
        config = f"--config=configs/quickstart_fast.py:{flags.data}"
        command = [sys.executable, "launch/fit_fast.py", config, f"--out={out}", "--vocab=256"]
        subprocess.run(command, cwd=ROOT, check=True)
    return out


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("backbones", "structures"))
    parser.add_argument("--data", required=True, help="demonstrations (launch/record_demos.py)")
    parser.add_argument("--out", default="runs/closed_loop", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some of the rows")
    parser.add_argument("--steps", type=int, default=0, help="default: 100, or the demo's 2500")
    parser.add_argument("--episodes", type=int, default=0, help="default: 13, or the demo's 130")
    parser.add_argument("train", nargs="*", help="flags for launch/train.py, after --")
    return parser.parse_args()


def _row(name: str, run: Path) -> dict[str, Any]:
    lines = (run / "log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]
    speeds = [row["step_s"] for row in map(json.loads, lines) if row["kind"] == "train"]
    score = json.loads((run / "results" / "trained" / "score.json").read_text())
    latency = score["latency_ms"]
    return {
        "": name,
        "loss": f"{losses[0]:.3f} → {losses[-1]:.3f}",
        "steps/s": f"{1 / sorted(speeds)[len(speeds) // 2]:.1f}",
        "actions/s": f"{1000 / latency['server']['p50']:.0f}",
        "served, ms": f"{latency['round_trip']['p50']:.1f}",
        "success": f"{score['success_rate']:.1%} of {score['episodes']}",
        "95 % interval": f"{score['wilson_low']:.1%} to {score['wilson_high']:.1%}",
    }


def _markdown(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
