"""How each dataset is standardised. Source: the rules of octo and openvla, by dataset name."""

import numpy as np

from vla_jax.data import ops
from vla_jax.data.spec import DatasetSpec, Episode, Trajectory


def bridge(episode: Episode) -> Trajectory:
    """Bridge V2, octo's rule: executed motion as action; the last frame has none."""
    state, action = episode["state"], episode["action"]
    return Trajectory(
        action=ops.cat(ops.state_delta(state[:, :6]), ops.binarise_gripper(action[:, 6])),
        proprio=state,
        language=episode["language"],
        keep=slice(0, -1),
    )


def bridge_from_second(episode: Episode) -> Trajectory:
    """Bridge V2, openvla's rule: as octo's without frame 0, whose recorded action is all zero."""
    trajectory = bridge(episode)
    return Trajectory(trajectory.action, trajectory.language, trajectory.proprio, keep=slice(1, -1))


def calvin(episode: Episode) -> Trajectory:
    """CALVIN: relative actions already scaled to [-1, 1] (20 mm, 0.05 rad); gripper -1 / 1."""
    action = episode["action"]
    return Trajectory(
        action=ops.cat(action[:, :6], np.floor((action[:, 6] + 1) / 2)),
        proprio=episode["robot_obs"].astype(np.float32),
        language=episode["language"],
    )


_BRIDGE = {"state": "observation/state", "action": "action", "language": "language_instruction"}
_BRIDGE_IMAGES = {"primary": "observation/image_0", "secondary": "observation/image_1"}

# SimplerEnv's WidowX takes a gripper command of -1 (closed) or 1 (open).
BRIDGE_DATASET = DatasetSpec(_BRIDGE_IMAGES, _BRIDGE, bridge, gripper_env=(-1.0, 1.0), hz=5.0)
BRIDGE_ORIG = DatasetSpec(
    _BRIDGE_IMAGES, _BRIDGE, bridge_from_second, gripper_env=(-1.0, 1.0), hz=5.0
)
CALVIN = DatasetSpec(
    images={"primary": "observation/rgb_static", "wrist": "observation/rgb_gripper"},
    features={
        # Converters differ in where they put the relative action.
        "action": ("rel_actions", "action/rel_actions", "action"),
        "robot_obs": "observation/robot_obs",
        "language": "language_instruction",
    },
    standardise=calvin,
    gripper_env=(-1.0, 1.0),
    hz=30.0,
)
