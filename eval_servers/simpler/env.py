"""SimplerEnv behind the interface of `eval_servers.rollout`."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Set

import numpy as np

from eval_servers import rollout
from eval_servers.episode import Chunks
from eval_servers.simpler.profiles import COMMANDS, REACH, GripperState, Profile, convert
from eval_servers.simpler.simulator import Settings, Simulator
from eval_servers.simpler.trials import Trial
from eval_servers.simpler.worlds import worlds
from eval_servers.video import film, jpeg

__all__ = ["SCENE_KEY", "SimplerEnv", "attempt", "film", "make_env"]

SCENE_KEY = "observation/scene"  # privileged: see `Simulator.scene`, float [n, 3]


class SimplerEnv(rollout.Env):
    """One simulator, for one robot's trials.

    Attributes:
        gripper: the commands it takes.
        arm_range: of the data's actions.
        profile: how actions are turned into the simulator's.
    """

    def __init__(
        self, simulator: Any, robot: str, profile: Profile, privileged: bool = False
    ) -> None:
        """Take over a `Simulator`.

        Args:
            simulator: to use, and to close.
            robot: of `tasks`.
            profile: see `Profile`.
            privileged: let observations hold where things are as well, for scripted experts.
        """
        self.gripper = COMMANDS[robot]
        self.arm_range = (-REACH[robot], REACH[robot])
        self.profile = profile
        self._simulator, self._robot, self._privileged = simulator, robot, privileged
        self._grip = GripperState()
        self._picture = np.zeros((1, 1, 3), np.uint8)

    def reset(self, episode: Trial) -> Dict[str, Any]:
        """Build the trial's world unless it stands, and start it."""
        world = worlds(episode.task, episode.setting)[episode.variant]
        self._picture = self._simulator.reset(world, episode.start)
        self.begin()
        instruction = self._simulator.instruction()
        # A table that disagrees with the simulator would evaluate another task than its name says.
        if not episode.swapped and episode.instruction not in ("", instruction):
            raise rollout.ActionError(
                "{}, {}, {}: the simulator says {!r}, the table {!r}: this is another version of"
                " it than the one setup.sh names".format(
                    episode.task, episode.variant, episode.start, instruction, episode.instruction
                )
            )
        return self.observe()

    def begin(self) -> None:
        """Let the gripper forget: a new episode, or a new instruction."""
        self._grip = GripperState()

    def step(self, action: np.ndarray) -> None:
        """One control step."""
        commands = COMMANDS[self._robot]
        low, high = sorted(commands.values())
        fits = action.shape == (7,) and np.isfinite(action).all()
        if not fits or not low <= action[6] <= high:
            raise rollout.ActionError(
                "the policy does not fit {}: an action is 7 finite numbers, the last from"
                " {closed:g} (closed) to {open:g} (open), not {}".format(
                    self._robot, np.round(action, 3).tolist(), **commands
                )
            )
        command, self._grip = convert(action, self._robot, self.profile, self._grip)
        self._picture = self._simulator.step(command)
        # The simulator itself would wait out its 100 steps before it goes on.
        if self.profile.advances and self._simulator.stats().get("is_drawer_open"):
            self._simulator.advance()

    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        """The camera's picture."""
        obs: Dict[str, Any] = {"observation/image": self._picture}
        if self._privileged:
            obs[SCENE_KEY] = self._simulator.scene()
        return obs

    def told(self, episode: Any) -> str:
        """The episode's instruction, or if that depends on the start the simulator's."""
        return episode.instruction or self.instruction()

    def instruction(self) -> str:
        """Return the simulator's instruction, which changes within a task of two halves."""
        return self._simulator.instruction()

    def success(self) -> bool:
        """Whether the task is done after the last step; it may come undone."""
        return bool(self._simulator.success())

    def stats(self) -> Dict[str, Any]:
        """Return what else the simulator counts: partial successes."""
        return self._simulator.stats()

    def frame(self) -> bytes:
        """The camera's picture as JPEG."""
        return jpeg(self._picture)

    def close(self) -> None:
        """Let go of the simulator."""
        self._simulator.close()


def make_env(
    settings: Settings, robot: str, profile: Profile, privileged: bool = False
) -> SimplerEnv:
    """Build it in the process that will use it."""
    return SimplerEnv(Simulator(settings), robot, profile, privileged)


def attempt(
    env: Any,
    client: Any,
    chunks: Chunks,
    episode: Trial,
    max_steps: int,
    frames: Optional[List[Any]],
) -> rollout.Outcome:
    """One try at a trial: all its steps, judged at the last, unless the profile stops at success.

    When the simulator's instruction changes, the policy and the gripper start afresh.

    Returns:
        The outcome with solved_at (the first step after which the task was done, None if never),
        told (the instructions) and stats.
    """
    # Two memories in a row would hold and delay the gripper twice.
    spec = client.metadata.get("action") or {}
    if spec.get("gripper_repeat", 0) > 0 or spec.get("gripper_patience", 1) > 1:
        raise rollout.ActionError(
            "the server gives its gripper a memory of its own, which is the profile's business"
            " here: serve without --gripper-repeat and --gripper-patience"
        )
    instructions: List[str] = []
    taken, limit, solved_at, ended = 0, min(episode.steps, max_steps), None, False
    while taken < limit and not ended:
        env.begin()
        instruction = env.instruction()
        # Only the first may be swapped; a later one is the simulator's, as it follows progress.
        instructions.append(instruction if instructions else env.told(episode))
        for _ in rollout.control_steps(
            env, client, chunks, instructions[-1], limit - taken, frames
        ):
            taken += 1
            if env.success():
                # The first time counts, also if the task comes undone and is done once more.
                solved_at, ended = solved_at or taken, env.profile.stops
            # With swapped instructions the policy is told one sentence throughout.
            if ended or (env.instruction() != instruction and not episode.swapped):
                break
    stats = {key: _plain(value) for key, value in env.stats().items()}
    more = {"solved_at": solved_at, "told": instructions, "stats": stats}
    return rollout.Outcome(success=env.success(), steps=taken, more=more)


def _plain(value: Any) -> Any:
    """A number or truth value of numpy's as JSON's; a number in words as a number."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
