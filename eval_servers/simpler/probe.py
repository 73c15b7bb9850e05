"""Build one world and say what draws it: versions, Vulkan devices, hash of its first frame.

    python -m eval_servers.simpler.probe --real2sim=DIR --task=widowx_stack_cube

Prints one line of JSON. An evaluation runs this before anything else, in a process of its own:
SAPIEN without a rendering device ends in an exception or in a crash. The score keeps the answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from importlib import metadata
from typing import Any, Dict, List, Sequence

from eval_servers import aside, graphics
from eval_servers.simpler import simulator
from eval_servers.simpler.tasks import ENVIRONMENTS
from eval_servers.simpler.worlds import SETTINGS, settings_of, starts, worlds

_TIMEOUT = 900.0  # seconds; a CPU takes minutes over one ray-traced frame
_PACKAGES = ("sapien", "numpy", "gymnasium", "scipy", "transforms3d", "opencv-python")


def probe(settings: simulator.Settings, task: str, setting: str) -> Dict[str, Any]:
    """`look` in a process of its own.

    Raises:
        simulator.SimulatorError: with the reason there is no picture.
    """
    simulator.check(settings, ())
    flags = [*_flags(settings), "--task=" + task, "--setting=" + setting]
    try:
        return aside.ask("eval_servers.simpler.probe", flags, _TIMEOUT)
    except aside.AsideError as error:
        message = "the simulator gives no picture ({}){}".format(error, _no_device())
        raise simulator.SimulatorError(message) from None


def look(settings: simulator.Settings, task: str, setting: str) -> Dict[str, Any]:
    """Build the simulator here and describe it and the first picture of a task.

    Raises:
        simulator.SimulatorError: it cannot be built, or its picture is blank.
    """
    try:
        # Asked first, so that a machine without a device gets a clear error.
        devices = [device["name"] for device in graphics.vulkan()]
    except graphics.GraphicsError as error:
        raise simulator.SimulatorError("no rendering device: {}".format(error)) from None
    variant, world = next(iter(worlds(task, setting).items()))
    built = simulator.Simulator(settings)
    picture = built.reset(world, starts(task, setting, variant)[0])
    built.close()
    driver = ", ".join(devices)
    # A device without a working driver draws one uniform color instead of failing.
    if picture.std() < 1:
        raise simulator.SimulatorError("the pictures are blank with {}".format(driver))
    versions = {name: _version(name) for name in _PACKAGES}
    versions["python"] = "{}.{}.{}".format(*sys.version_info[:3])
    return dict(
        simulator.describe(settings),
        driver=driver,
        versions=versions,
        cameras={"image": list(picture.shape)},
        first_frames={task: hashlib.sha256(picture.tobytes()).hexdigest()[:16]},
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the simulator is and how it draws."""
    add = parser.add_argument
    add(
        "--real2sim",
        default=os.environ.get("REAL2SIM", ""),
        metavar="DIR",
        help="a ManiSkill2_real2sim source tree (default: $REAL2SIM)",
    )
    add(
        "--assets",
        default=os.environ.get("REAL2SIM_ASSETS", ""),
        metavar="DIR",
        help="folder of its assets (default: $REAL2SIM_ASSETS, else data in the tree)",
    )
    add(
        "--drawn",
        choices=simulator.DRAWN,
        default="official",
        help="official (default) ray-traces the drawers, as published; raster does not, for tests"
        " without a GPU",
    )


def settings_of_flags(flags: argparse.Namespace) -> simulator.Settings:
    """Return the settings that the flags of `add_flags` name."""
    return simulator.Settings(flags.real2sim, flags.assets, flags.drawn)


def _flags(settings: simulator.Settings) -> List[str]:
    return [
        "--real2sim=" + settings.root,
        "--assets=" + settings.data,
        "--drawn=" + settings.drawn,
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _no_device() -> str:
    """Describe the Vulkan devices, which are the likely reason for a missing picture."""
    try:
        devices = aside.ask("eval_servers.graphics", ["vulkan"], 60.0)
    except aside.AsideError as error:
        return "; Vulkan: {}. eval_servers/simpler/lavapipe.sh gives a CPU one".format(error)
    names = ", ".join(device["name"] for device in devices)
    return (
        "; Vulkan devices: {}. SAPIEN takes GPUs with their own driver, and Mesa's lavapipe from 26"
        " on, or from 25 through eval_servers/simpler/lavapipe.sh".format(names)
    )


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.simpler.probe", description=(__doc__ or "").splitlines()[0]
    )
    add_flags(parser)
    parser.add_argument("--task", choices=sorted(ENVIRONMENTS), default="widowx_stack_cube")
    parser.add_argument("--setting", choices=SETTINGS, default="prepackaged")
    flags = parser.parse_args(arguments)
    settings = settings_of_flags(flags)
    try:
        if flags.setting not in settings_of(flags.task):
            parser.error("{} has no setting {}".format(flags.task, flags.setting))
        simulator.check(settings, list(worlds(flags.task, flags.setting).values())[:1])
        print(json.dumps(look(settings, flags.task, flags.setting)))
    except (simulator.SimulatorError, ImportError, OSError, RuntimeError) as error:
        print("simpler: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
