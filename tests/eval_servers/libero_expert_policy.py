"""The scripted expert as a policy: its actions go through normalization and back, as a model's."""

import json
from typing import Any

import numpy as np

from eval_servers.libero.env import SCENE_KEY, LiberoEnv
from eval_servers.libero.expert import Expert
from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference.protocol import ObservationError

LIMIT = 0.95  # of the actions' range, as statistics of data have it


class ExpertPolicy:
    """Knows where things are from the observation, which takes rollout's --privileged.

    What a model would predict is made of the expert's action by the dataset's normalization, with
    the gripper as 1 = open, 0 = closed; from there it is `Policy`'s own way: units
    and gripper commands by the `ActionSpec` that a checkpoint carries as JSON.
    """

    def __init__(self) -> None:
        commands = LiberoEnv.gripper
        grips = (commands["closed"], commands["open"])
        spec = ActionSpec(7, "bounds", 1.0, (-LIMIT,) * 6, (LIMIT,) * 6, grips, 20.0)
        self._spec = ActionSpec.from_json(json.loads(json.dumps(spec.to_json())))
        self.metadata = {
            "model": "libero expert",
            "chunk": 1,
            "action_dim": 7,
            "hz": 20.0,
            "gripper": commands,
            "cameras": {"scene": SCENE_KEY},
        }

    def warmup(self) -> None:
        pass

    def new_session(self) -> Any:
        return None, GripperState()

    def check(self, obs: dict[str, Any]) -> None:
        missing = [key for key in (SCENE_KEY, "prompt") if key not in obs]
        if missing:
            raise ObservationError(f"missing {missing}: run the rollout with --privileged")

    def infer(self, session: Any, obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        expert, gripper = session
        expert = expert or Expert(obs["prompt"], limit=LIMIT)
        action = expert.act(obs[SCENE_KEY])
        predicted = self._spec.normalize(action)
        predicted[6] = float(action[6] < 0)
        actions, gripper = self._spec.to_env(np.asarray(predicted)[None], gripper)
        return {"actions": actions}, (expert, gripper)


def main() -> None:
    """Serve it: `python -m tests.eval_servers.libero_expert_policy PORT`."""
    import sys

    from vla_jax.serve import server

    server.run(ExpertPolicy(), server.ServerOptions(port=int(sys.argv[1])), print)


if __name__ == "__main__":
    main()
