"""How the programs are started: as `vla NAME`, or as `python launch/NAME.py` of a checkout.

Texts for people name the programs as scripts of a checkout; whoever has typed `vla` gets every one
of them as `vla` takes it.
"""

import argparse
import re
import sys
from pathlib import Path

# Words of the command line -> module of `vla_jax.launch`, and what it does.
COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("train",): ("train", "train a VLA, or go on with a run"),
    ("local",): ("local", "train with several processes on this machine"),
    ("plan",): ("plan", "what a run will cost on a machine that is not here"),
    ("serve",): ("serve", "serve a trained policy to robots and simulators"),
    ("evaluate",): ("evaluate", "run a checkpoint or a server in a simulator"),
    ("convert",): ("convert", "weights in and out: Hugging Face, RoboVLMs, openpi, LeRobot"),
    ("replay",): ("replay", "recorded observations through a policy, beside recorded actions"),
    ("data", "inspect"): ("inspect_data", "what a dataset holds, and what is wrong with it"),
    ("data", "convert"): ("convert_data", "CALVIN, LeRobot or LIBERO data into RLDS"),
    ("data", "fast"): ("fit_fast", "a FAST tokenizer of action chunks, fit on a dataset"),
    ("data", "record"): ("record_demos", "demonstrations in the tabletop world"),
    ("doctor",): ("doctor", "is this machine ready?"),
    ("demo",): ("demo", "demonstrations, training, evaluation and a report in one command"),
}
_NAMES = {module: " ".join(("vla", *words)) for words, (module, _) in COMMANDS.items()}
# Of a checkout's own scripts alone; /somebody/launch/train.py is a path of the user's.
_SCRIPT = re.compile(r"(?<![\w./~-])(?:python )?launch/(\w+)\.py")


def program() -> str:
    """What the running program is called, to begin its messages with: `train.py`, `vla train`."""
    return Path(sys.argv[0]).name


def as_typed(text: str) -> str:
    """A text with its `python launch/NAME.py` as `vla NAME`, if this program was started so.

    Args:
        text: a message, a hint or a help text.
    """
    # `cli.main` puts the words there that were typed.
    if not sys.argv[0].startswith("vla "):
        return text
    return _SCRIPT.sub(lambda match: _NAMES.get(match[1], match[0]), text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of a program's docstring, and names programs as they are typed."""

    def format_help(self) -> str:
        """The whole text."""
        return as_typed(super().format_help())
