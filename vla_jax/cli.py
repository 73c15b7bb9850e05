"""The command `vla`: every program of `launch/`, from any folder.

    vla train --config=quickstart --workdir=runs/quickstart
    vla serve --checkpoint=runs/quickstart
    vla evaluate tabletop --checkpoint=runs/quickstart --out=runs/eval
    vla data inspect DIR

`vla NAME ...` is `python launch/NAME.py ...` of a checkout, flag for flag.
"""

import runpy
import sys

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


def main() -> None:
    """Find the program, hand it the rest of the command line."""
    words = sys.argv[1:]
    for command, (module, _) in COMMANDS.items():
        if tuple(words[: len(command)]) == command:
            name = " ".join(("vla", *command))
            sys.argv = [name, *words[len(command) :]]
            runpy.run_module(f"vla_jax.launch.{module}", run_name="__main__")
            return
    print(_usage())
    if words and words[0] not in ("-h", "--help", "help"):
        sys.exit(f"vla: no command {' '.join(words[:2])!r}")


def _usage() -> str:
    rows = [f"  {' '.join(command):<14}{text}" for command, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: vla COMMAND [FLAGS]; vla COMMAND --help says more", "", *rows])


if __name__ == "__main__":
    main()
