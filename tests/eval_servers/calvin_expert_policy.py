"""The scripted expert as a policy: its actions go through normalization and back, as a model's."""

import json
from typing import Any

from eval_servers.calvin import chains
from eval_servers.calvin.env import SCENE_KEY
from eval_servers.calvin.expert import Expert
from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference.protocol import STATE_KEY, ObservationError

CLIP = 0.65  # RoboVLMs' on CALVIN


class ExpertPolicy:
    """Knows the scene from the observation, which takes rollout's --privileged.

    What a model would predict is made of the expert's action by the dataset's normalization, with
    the gripper as 1 = open, 0 = closed; from there it is `Policy`'s own way: units
    and gripper commands by the `ActionSpec` that a checkpoint carries as JSON.
    """

    def __init__(self) -> None:
        spec = ActionSpec(7, "bounds", CLIP, (-1.0,) * 6, (1.0,) * 6, (-1.0, 1.0), 30.0)
        self._spec = ActionSpec.from_json(json.loads(json.dumps(spec.to_json())))
        self._tasks = {text: task for task, text in chains.load().instructions.items()}
        self.metadata = {"model": "calvin expert", "chunk": 1, "action_dim": 7, "hz": 30.0}

    def warmup(self) -> None:
        pass

    def new_session(self) -> Any:
        return None, GripperState()

    def check(self, obs: dict[str, Any]) -> None:
        missing = [key for key in (STATE_KEY, SCENE_KEY, "prompt") if key not in obs]
        if missing:
            raise ObservationError(f"missing {missing}: run the rollout with --privileged")

    def infer(self, session: Any, obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        expert, gripper = session
        expert = expert or Expert(self._tasks[obs["prompt"]], limit=CLIP)
        action = expert.act(obs[STATE_KEY], obs[SCENE_KEY])
        predicted = self._spec.normalize(action)
        predicted[6] = (action[6] + 1) / 2
        actions, gripper = self._spec.to_env(predicted[None], gripper)
        return {"actions": actions}, (expert, gripper)


def main() -> None:
    """Serve it: `python -m tests.eval_servers.calvin_expert_policy PORT`."""
    import sys

    from vla_jax.serve import server

    server.run(ExpertPolicy(), server.ServerOptions(port=int(sys.argv[1])), print)


if __name__ == "__main__":
    main()
