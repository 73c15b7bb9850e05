"""Build the simulator once and say what it is: versions, GL driver, hash of the first frames.

    python -m eval_servers.calvin.probe --calvin-env=DIR --renderer=egl

Prints one line of JSON. An evaluation runs this before anything else, in a process of its own, so
that a missing driver is one clear line and a crash in one takes nothing down, and keeps the answer
in its score: two scores are of the same pictures if the hashes agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from importlib import metadata
from typing import Any, Dict, Sequence

import numpy as np

from eval_servers import aside
from eval_servers.calvin import simulator
from eval_servers.calvin.chains import load
from eval_servers.calvin.initial import initial_state

_TIMEOUT = 300.0  # seconds; EGL compiles its shaders on the first frame
_PACKAGES = ("pybullet", "numpy", "hydra-core", "scipy")


def probe(settings: simulator.Settings) -> Dict[str, Any]:
    """`look` in a process of its own.

    Raises:
        simulator.SimulatorError: with the reason the simulator gives no picture.
    """
    simulator.check(settings)
    try:
        return aside.ask("eval_servers.calvin.probe", _flags(settings), _TIMEOUT)
    except aside.AsideError as error:
        raise simulator.SimulatorError(
            "the simulator gives no picture ({})".format(error)
        ) from None


def look(settings: simulator.Settings) -> Dict[str, Any]:
    """Build the simulator here and describe it and its first pictures.

    Raises:
        simulator.SimulatorError: it cannot be built, or its pictures are blank.
    """
    record = simulator.describe(settings)
    world = simulator.Simulator(settings)
    views = world.reset(*initial_state(load().states[0]))["rgb_obs"]
    cameras = {name: np.ascontiguousarray(view, np.uint8) for name, view in views.items()}
    # Closed before the check below raises, which would leave the GL context open.
    world.close()
    # A renderer without a working driver returns a uniform picture instead of an error.
    blank = [name for name, view in cameras.items() if view.std() < 1]
    if blank:
        raise simulator.SimulatorError(
            "the pictures of {} are blank with {}".format(blank, world.driver)
        )
    return dict(
        record,
        driver=world.driver,
        versions={
            "python": "{}.{}.{}".format(*sys.version_info[:3]),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        cameras={name: list(view.shape) for name, view in sorted(cameras.items())},
        first_frames={
            name: hashlib.sha256(view.tobytes()).hexdigest()[:16]
            for name, view in sorted(cameras.items())
        },
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a world, shared by everything here that builds one."""
    add = parser.add_argument
    add(
        "--calvin-env",
        default=os.environ.get("CALVIN_ENV", ""),
        metavar="DIR",
        help="a calvin_env source tree (default: $CALVIN_ENV)",
    )
    add(
        "--renderer",
        choices=simulator.RENDERERS,
        default="egl",
        help="egl (default) draws as CALVIN's data were drawn, on the GPU that EGL_VISIBLE_DEVICES"
        " names; tiny needs no GL driver and looks different: for tests",
    )
    add("--scene", choices=simulator.SCENES, default="D", help="default: D")
    add(
        "--dataset",
        default="",
        metavar="DIR",
        help="a CALVIN split, as task_D_D/validation: take the world its data were made in from"
        " its .hydra/merged_config.yaml",
    )


def settings_of(flags: argparse.Namespace) -> simulator.Settings:
    """Return the settings that the flags of `add_flags` name."""
    return simulator.Settings(flags.calvin_env, flags.renderer, flags.scene, flags.dataset)


def _flags(settings: simulator.Settings) -> Sequence[str]:
    return [
        "--calvin-env=" + settings.root,
        "--renderer=" + settings.renderer,
        "--scene=" + settings.scene,
        "--dataset=" + settings.dataset,
    ]


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.calvin.probe", description=(__doc__ or "").splitlines()[0]
    )
    add_flags(parser)
    try:
        print(json.dumps(look(settings_of(parser.parse_args(arguments)))))
    except (simulator.SimulatorError, ImportError, OSError) as error:
        print("calvin: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
