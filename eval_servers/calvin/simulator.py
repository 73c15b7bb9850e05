"""calvin_env, built without its dataset, its git checkout, gym, GitPython or torch.

Everything specific to calvin_env's code is here. Its source tree is used as it is; three modules it
imports but barely uses (gym: a base class and a random generator; git: the commit for a log line)
are replaced by small stand-ins in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import sys
import tempfile
import types
import warnings
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from eval_servers import aside

RENDERERS = ("egl", "tiny")
SCENES = ("A", "B", "C", "D")
CAMERAS = ("static", "gripper")


class SimulatorError(RuntimeError):
    """calvin_env cannot be built; the message is for the user."""


@dataclass(frozen=True)
class Settings:
    """The world to build.

    Attributes:
        root: a calvin_env source tree.
        renderer: egl draws with OpenGL, as CALVIN's data were; tiny on the CPU without any GL.
            Their pictures differ visibly, so a score says which one it is of.
        scene: A, B, C or D; not used with a dataset.
        dataset: folder whose .hydra/merged_config.yaml describes the world its data were made in;
            "" composes calvin_env's own configuration files.
    """

    root: str
    renderer: str = "egl"
    scene: str = "D"
    dataset: str = ""


class Simulator:
    """One calvin_env.

    Attributes:
        driver: what the renderer says of itself: the GL driver, or TinyRenderer.
    """

    def __init__(self, settings: Settings) -> None:
        """Build the world; takes seconds.

        Raises:
            SimulatorError: naming what is missing.
        """
        check(settings)
        _import_from(settings.root)
        printed: List[str] = []
        with _captured(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a missing version_base, in upstream
            import hydra  # type: ignore[import-not-found]
            from calvin_env.envs import play_table_env  # type: ignore[import-not-found]

            # The constructor ends by asking git for a commit, which fails in a tree that is no
            # checkout.
            play_table_env.get_git_commit_hash = lambda path: "not asked"
            config = load_config(settings)
            options = {"show_gui": False, "use_vr": False, "use_scene_info": True}
            try:
                self._env: Any = hydra.utils.instantiate(config.env, **options)
            except SystemExit:  # how calvin_env reports a plugin that does not load
                raise SimulatorError(_NO_EGL) from None
            self._env.get_camera_obs()  # the first picture compiles shaders, and prints
        self.driver = "TinyRenderer" if settings.renderer == "tiny" else _driver(printed[0])

    def reset(self, robot: np.ndarray, scene: np.ndarray) -> Dict[str, Any]:
        """Put everything where robot_obs [15] and scene_obs [24] say; returns an observation.

        Not quite the same after every history: blocks start up to 0.2 mm and 0.2 degrees off in a
        world that has been used, because bullet keeps contacts from before (calvin_env's own way).
        """
        # calvin_env would go on observing the last command of the episode before.
        self._env.robot.gripper_action = int(robot[14])
        return self._env.reset(robot_obs=robot, scene_obs=scene)

    def step(self, action: np.ndarray) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """One control step (1/30 s); returns (observation, info).

        Args:
            action: float [7]: tool point relative to its last target, in units of 0.02 m and
                0.05 rad, and the gripper, 1 = open, -1 = closed.
        """
        obs, _, _, info = self._env.step(action)
        return obs, info

    def info(self) -> Dict[str, Any]:
        """Poses, joints, lamps, contacts; see `oracle`."""
        return self._env.get_info()

    def close(self) -> None:
        """Disconnect from the physics server."""
        with _captured([]):
            self._env.close()
        self._env.close = lambda: None  # its __del__ would disconnect, and print, once more


def check(settings: Settings) -> None:
    """Raise SimulatorError, with everything that is wrong, before anything is imported."""
    problems = []
    if not settings.root:
        problems.append("where is calvin_env? give --calvin-env DIR or set CALVIN_ENV")
    elif not os.path.isfile(os.path.join(settings.root, "calvin_env", "envs", "play_table_env.py")):
        problems.append("{} is no calvin_env source tree".format(settings.root))
    if settings.renderer not in RENDERERS:
        problems.append("renderer {!r} is none of {}".format(settings.renderer, RENDERERS))
    if settings.scene not in SCENES:
        problems.append("scene {!r} is none of {}".format(settings.scene, SCENES))
    if settings.dataset and not os.path.isfile(_merged_config(settings.dataset)):
        problems.append("no {}".format(_merged_config(settings.dataset)))
    if problems:
        raise SimulatorError("; ".join(problems))


def load_config(settings: Settings) -> Any:
    """The configuration to instantiate: the dataset's, or composed as CALVIN recorded its data.

    Both have the static and the gripper camera only (the tactile one alone needs torch-era
    packages) and find their meshes in `settings.root`.
    """
    from omegaconf import OmegaConf  # type: ignore[import-not-found]

    if settings.dataset:
        config: Any = OmegaConf.load(_merged_config(settings.dataset))
        # Others, as the tactile one, import packages that are not installed here.
        for name in set(config.cameras) - set(CAMERAS):
            del config.cameras[name]
    else:
        folder = os.path.join(settings.root, "conf")

        def read(name: str) -> Any:
            return OmegaConf.load(os.path.join(folder, *name.split("/")) + ".yaml")

        robot: Any = OmegaConf.merge(read("robot/panda"), read("robot/panda_longer_finger"))
        # Hydra removes this key when it composes; merged by hand, it would reach the robot's
        # constructor.
        del robot["defaults"]
        config = OmegaConf.create(
            {
                "scene": read("scene/calvin_scene_" + settings.scene),
                "robot": robot,
                "cameras": {name: read("cameras/cameras/" + name) for name in CAMERAS},
                "env": read("env/play_table_env"),
                "use_vr": False,
            }
        )
    # The recorded path is of the machine that made the data.
    config.data_path = os.path.abspath(os.path.join(settings.root, "data"))
    config.scene.data_path = "${data_path}"
    config.env.use_egl = settings.renderer == "egl"
    return config


def describe(settings: Settings) -> Dict[str, Any]:
    """Return what identifies the world in a score, as far as it is known without building it."""
    record: Dict[str, Any] = {
        "calvin_env": aside.commit(settings.root),
        "scene": settings.scene,
        "renderer": settings.renderer,
        "config": "calvin_env's own, panda_longer_finger, static and gripper cameras",
    }
    if settings.dataset:
        with open(_merged_config(settings.dataset), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        record.update(scene="as in the dataset", config="merged_config.yaml sha256 " + digest)
    return record


def _merged_config(dataset: str) -> str:
    return os.path.join(dataset, ".hydra", "merged_config.yaml")


def _import_from(root: str) -> None:
    """Make `import calvin_env` find `root`, and what it imports in vain find a stand-in."""
    path = os.path.abspath(root)
    if path not in sys.path:
        sys.path.insert(0, path)
    # Of gym it needs a base class and a random generator, which are not worth the dependency.
    seeding = types.ModuleType("gym.utils.seeding")
    seeding.np_random = _np_random  # type: ignore[attr-defined]
    utils = types.ModuleType("gym.utils")
    utils.seeding = seeding  # type: ignore[attr-defined]
    gym = types.ModuleType("gym")
    gym.Env, gym.utils = object, utils  # type: ignore[attr-defined]
    stand_ins = {"gym": gym, "gym.utils": utils, "gym.utils.seeding": seeding}
    sys.modules.update(stand_ins, git=types.ModuleType("git"))


def _np_random(seed: Optional[int] = None) -> Tuple[np.random.Generator, Optional[int]]:
    return np.random.default_rng(seed), seed


@contextlib.contextmanager
def _captured(printed: List[str]) -> Iterator[None]:
    """Keep standard output to ourselves meanwhile, what C++ prints included; appended at the end.

    bullet names its GL driver there, and prints a dozen lines nobody asked for.
    """
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    # Bullet prints from C++, so only a change of the file descriptor catches it.
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            libc.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            printed.append(file.read().decode("utf-8", "replace"))


def _driver(printed: str) -> str:
    """The GL driver among what bullet printed."""
    lines = [
        match.group(1).strip()
        for name in ("GL_RENDERER", "GL_VERSION")
        for match in [re.search(name + r"\s*=\s*(.+)", printed)]
        if match
    ]
    return ", ".join(lines) or "unknown GL driver"


_NO_EGL = (
    "bullet's EGL plugin does not load: install an EGL driver (Debian: libegl1 libgl1-mesa-dri"
    " draw without a GPU), or use --renderer=tiny, whose pictures differ from CALVIN's data"
)
