"""The scripted expert as a policy: its actions go through normalization and back, as a model's."""

import json
from typing import Any

import numpy as np

from eval_servers.simpler.env import SCENE_KEY
from eval_servers.simpler.expert import Expert
from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference.protocol import ObservationError

# 1 % and 99 % quantiles of Bridge's actions (RoboVLMs' statistics of bridge_orig).
LOW = (-0.028727, -0.041703, -0.026094, -0.080921, -0.092887, -0.207183)
HIGH = (0.02831, 0.040855, 0.040162, 0.08192, 0.077929, 0.203826)


class ExpertPolicy:
    """Knows where things are from the observation, which takes rollout's --privileged.

    What a model would predict is made of the expert's action by the dataset's normalization, with
    the gripper as 1 = open, 0 = closed; from there it is `Policy`'s own way: units
    and gripper commands by the `ActionSpec` that a checkpoint carries as JSON.
    """

    def __init__(self) -> None:
        spec = ActionSpec(7, "q99", 1.0, LOW, HIGH, (-1.0, 1.0), 5.0)
        self._spec = ActionSpec.from_json(json.loads(json.dumps(spec.to_json())))
        self.metadata = {"model": "simpler expert", "chunk": 1, "action_dim": 7, "hz": 5.0}

    def warmup(self) -> None:
        pass

    def new_session(self) -> Any:
        return Expert(), GripperState()

    def check(self, obs: dict[str, Any]) -> None:
        missing = [key for key in ("observation/image", SCENE_KEY, "prompt") if key not in obs]
        if missing:
            raise ObservationError(f"missing {missing}: run the rollout with --privileged")

    def infer(self, session: Any, obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        expert, gripper = session
        action = expert.act(obs[SCENE_KEY])
        predicted = self._spec.normalize(action)
        predicted[6] = (action[6] + 1) / 2
        actions, gripper = self._spec.to_env(predicted[None], gripper)
        return {"actions": actions}, (expert, gripper)


class StillPolicy:
    """Stays where it is, its gripper open."""

    def __init__(self, steps: int = 1) -> None:
        self.metadata = {"model": "still", "chunk": steps, "action_dim": 7}

    def warmup(self) -> None:
        pass

    def new_session(self) -> None:
        return None

    def check(self, obs: dict[str, Any]) -> None:
        if obs["observation/image"].dtype != np.uint8:
            raise ObservationError("the image is not uint8")

    def infer(self, session: None, obs: dict[str, Any]) -> tuple[dict[str, Any], None]:
        actions = np.zeros((self.metadata["chunk"], 7), np.float32)
        actions[:, 6] = 1.0
        return {"actions": actions}, None


def main() -> None:
    """Serve it: `python -m tests.eval_servers.simpler_expert_policy PORT [still]`."""
    import sys

    from vla_jax.serve import server

    policy = StillPolicy() if sys.argv[2:] == ["still"] else ExpertPolicy()
    server.run(policy, server.ServerOptions(port=int(sys.argv[1])), print)


if __name__ == "__main__":
    main()
