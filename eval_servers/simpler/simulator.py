"""ManiSkill2_real2sim, which SimplerEnv's environments are made of, in SAPIEN.

Everything specific to its code is here. Its source tree is used as it is. SimplerEnv itself is a
table of names over it and the wrappers of a few policies; `tasks` and `profiles` stand for those.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from eval_servers import aside
from eval_servers.simpler.assets import Files
from eval_servers.simpler.worlds import Start, World

DRAWN = ("official", "raster")


class SimulatorError(RuntimeError):
    """The simulator cannot be built; the message is for the user."""


@dataclass(frozen=True)
class Settings:
    """Place of the simulator's files, and how it draws.

    Attributes:
        root: a ManiSkill2_real2sim source tree.
        data: folder of its assets; "" is its own.
        drawn: official draws the drawers by ray tracing, as published; raster does not, which is a
            thousand times faster without a GPU and looks different.
    """

    root: str
    data: str = ""
    drawn: str = "official"

    @property
    def files(self) -> Files:
        """Files of this simulator."""
        return Files(self.root, self.data)


class Robot(NamedTuple):
    """How the published evaluation drives a robot: controller, control and physics rate, camera."""

    control: str
    control_hz: int
    physics_hz: int
    camera: str


_WIDOWX = Robot(
    "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos", 5, 500, "3rd_view_camera"
)
ROBOTS: Dict[str, Robot] = {
    "google_robot_static": Robot(
        "arm_pd_ee_delta_pose_align_interpolate_by_planner"
        "_gripper_pd_joint_target_delta_pos_interpolate_by_planner",
        3,
        513,
        "overhead_camera",
    ),
    "widowx": _WIDOWX,
    "widowx_sink_camera_setup": _WIDOWX,
}


class Simulator:
    """One environment at a time; another is built when another world is asked for."""

    def __init__(self, settings: Settings) -> None:
        """Import the simulator.

        Raises:
            SimulatorError: naming what is missing.
        """
        check(settings, ())
        _import_from(settings)
        self._settings = settings
        self._world: Optional[World] = None
        self._env: Any = None
        self._random: Any = None
        self._obs: Dict[str, Any] = {}
        self._info: Dict[str, Any] = {}
        self._done = False

    def reset(self, world: World, start: Start) -> np.ndarray:
        """Start an episode; returns its first picture, uint8 [h, w, 3].

        Building a world takes seconds to minutes. The published evaluation builds it anew for every
        episode; here the random state is put back instead, so that choices are the same.
        """
        # Building takes up to minutes, so episodes of one world come one after another.
        if world != self._world:
            self._build(world)
        inner = self._env.unwrapped
        # As if the world were new: the state was taken right after it was built.
        inner._main_rng.set_state(self._random)
        self._obs, _ = self._env.reset(seed=start.seed, options=reset_options(start))
        self._info, self._done = {}, False
        return self.picture()

    def step(self, action: np.ndarray) -> np.ndarray:
        """One control step of float64 [7]; returns the next picture."""
        # The fourth value, a time limit's, is passed over: when an episode ends is the caller's to
        # say.
        self._obs, _, self._done, _, self._info = self._env.step(action)
        self._done = bool(self._done)
        return self.picture()

    def picture(self) -> np.ndarray:
        """Return the picture of the policy's camera, uint8 [h, w, 3]."""
        assert self._world is not None
        camera = ROBOTS[self._world.robot].camera
        return np.ascontiguousarray(self._obs["image"][camera]["rgb"], np.uint8)

    def success(self) -> bool:
        """Whether the environment calls the task done after the last step."""
        return self._done

    def stats(self) -> Dict[str, Any]:
        """Return the environment's other counts: partial successes, the drawer's way."""
        return dict(self._info.get("episode_stats") or {})

    def instruction(self) -> str:
        """Return the environment's instruction as it is now."""
        return str(self._env.unwrapped.get_language_instruction())

    def advance(self) -> None:
        """Go on to the second half of a task, if it is in its first."""
        if not self._env.unwrapped.is_final_subtask():
            self._env.unwrapped.advance_to_next_subtask()

    def scene(self) -> np.ndarray:
        """Positions x, y, z of the gripper and the movable objects, in the robot's base frame.

        Float [n, 3]: the point between the fingers first, then the object to move, its target, and
        what else there is.
        """
        inner = self._env.unwrapped
        to_base = inner.agent.robot.pose.inv()
        # Environments with two objects name them; those with one call it `obj`.
        things = [inner.tcp]
        if hasattr(inner, "episode_source_obj"):
            things += [inner.episode_source_obj, inner.episode_target_obj]
        elif getattr(inner, "obj", None) is not None:
            things += [inner.obj]
        return np.array([(to_base * thing.pose).p for thing in things], np.float32)

    def close(self) -> None:
        """Let go of the environment."""
        if self._env is not None:
            self._env.close()
            self._env = self._world = None
            gc.collect()  # SAPIEN frees its scenes when Python does

    def _build(self, world: World) -> None:
        self.close()
        import gymnasium  # type: ignore[import-not-found]

        arguments = build_options(world, self._settings)
        self._env = gymnasium.make(world.gym, disable_env_checker=True, **arguments)
        self._random = self._env.unwrapped._main_rng.get_state()
        self._world = world


def build_options(world: World, settings: Settings) -> Dict[str, Any]:
    """The arguments with which the published evaluation makes this environment."""
    options: Dict[str, Any] = dict(world.options)
    options["obs_mode"] = "rgbd"
    options["renderer_kwargs"] = {"offscreen_only": True}
    if world.prepackaged:
        return dict(options, prepackaged_config=True)
    robot = ROBOTS[world.robot]
    options.update(
        robot=world.robot,
        control_mode=robot.control,
        control_freq=robot.control_hz,
        sim_freq=robot.physics_hz,
        scene_name=world.scene,
        # The photograph replaces all but robot and objects, which the segmentation tells from the
        # rest.
        camera_cfgs={"add_segmentation": True},
        max_episode_steps=100000,  # an episode's end is ours to say
    )
    if world.overlay:
        photograph = os.path.join(settings.files.data, "real_inpainting", world.overlay)
        options.update(rgb_overlay_path=photograph, rgb_overlay_cameras=[robot.camera])
    if world.traced and settings.drawn == "official":
        options["shader_dir"] = "rt"
    return options


def reset_options(start: Start) -> Dict[str, Any]:
    """The options with which the published evaluation resets an environment."""
    options: Dict[str, Any] = {}
    if start.robot is not None:
        x, y, yaw = start.robot
        # A turn by yaw after the half turn by which robots face the table: (0, 0, 0, 1).
        turn = [-np.sin(yaw / 2), 0.0, 0.0, np.cos(yaw / 2)]
        options["robot_init_options"] = {
            "init_xy": np.array([x, y]),
            "init_rot_quat": np.array(turn),
        }
    if start.place is not None:
        options["obj_init_options"] = {"init_xy": np.array(start.place)}
    elif start.episode is not None:
        options["obj_init_options"] = {"episode_id": start.episode}
    return options


def check(settings: Settings, needed: Sequence[World]) -> None:
    """Raise SimulatorError, with everything that is wrong or missing, before anything is imported.

    Args:
        settings: see `Settings`.
        needed: whose files are to be there.
    """
    problems: List[str] = []
    package = os.path.join(settings.root, "mani_skill2_real2sim", "envs", "sapien_env.py")
    if not settings.root:
        problems.append("where is ManiSkill2_real2sim? give --real2sim DIR or set REAL2SIM")
    elif not os.path.isfile(package):
        problems.append("{} is no ManiSkill2_real2sim source tree".format(settings.root))
    if settings.drawn not in DRAWN:
        problems.append("drawn {!r} is none of {}".format(settings.drawn, DRAWN))
    if not problems:
        if not os.path.isdir(settings.files.data):
            problems.append("no folder of assets {}".format(settings.files.data))
        else:
            missing = settings.files.missing(needed)
            if missing:
                problems.append(
                    "{} files are missing, and the simulator would go on without them: {}".format(
                        len(missing), ", ".join(missing)
                    )
                )
    if problems:
        raise SimulatorError("; ".join(problems))


def describe(settings: Settings) -> Dict[str, Any]:
    """Return what identifies the simulator in a score, as far as it is known unbuilt."""
    return {
        "real2sim": aside.commit(settings.root),
        "drawn": settings.drawn,
        "stand_ins": settings.files.stand_ins(),
    }


def _import_from(settings: Settings) -> None:
    """Make the simulator's packages importable, and let it find its assets."""
    os.environ["MS2_REAL2SIM_ASSET_DIR"] = os.path.abspath(settings.files.data)
    path = os.path.abspath(settings.root)
    if path not in sys.path:
        sys.path.insert(0, path)
    if int(np.__version__.split(".")[0]) >= 2:
        # make, reset and render still look fine; the first step is a segmentation fault.
        raise SimulatorError("SAPIEN 2 needs numpy below 2, this is {}".format(np.__version__))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pkg_resources, in sapien
            import mani_skill2_real2sim.envs  # type: ignore[import-not-found] # noqa: F401
            from mani_skill2_real2sim.envs.custom_scenes import (  # type: ignore[import-not-found]
                open_drawer_in_scene,
            )
    except ModuleNotFoundError as error:
        raise SimulatorError(
            "{}: make the environment with eval_servers/simpler/setup.sh".format(error)
        ) from None
    drawers = open_drawer_in_scene.OpenDrawerInSceneEnv
    if settings.drawn == "raster" and not hasattr(drawers, "_published_config"):
        # Prepackaged environments overrule the argument.
        drawers._published_config = drawers._setup_prepackaged_env_init_config
        drawers._setup_prepackaged_env_init_config = _rastered


def _rastered(env: Any) -> Dict[str, Any]:
    return dict(env._published_config(), shader_dir="ibl")
