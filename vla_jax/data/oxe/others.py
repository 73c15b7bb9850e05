"""Bridge, DROID and LIBERO with their relatives, CALVIN, and robots that are no single arm.

Source of the rules: octo and openvla, by dataset name; of the rates: Open X-Embodiment's overview.
"""

from dataclasses import replace

import numpy as np

from vla_jax.data import ops
from vla_jax.data.oxe.recipe import STEP, pad, recipe, take, zeros
from vla_jax.data.oxe.rtx import POS_EULER, POS_QUAT
from vla_jax.data.spec import DatasetSpec, Episode, Trajectory


def bridge(episode: Episode) -> Trajectory:
    """Bridge V2, octo's rule: executed motion as action; the last frame has none."""
    state, action = episode["state"], episode["action"]
    return Trajectory(
        action=ops.cat(ops.state_delta(state[:, :6]), ops.binarize_gripper(action[:, 6])),
        proprio=state,
        language=episode["language"],
        keep=slice(0, -1),
    )


def bridge_from_second(episode: Episode) -> Trajectory:
    """Bridge V2, openvla's rule: as octo's without frame 0, whose recorded action is all zero."""
    trajectory, state = bridge(episode), episode["state"]
    return Trajectory(
        action=trajectory.action,
        # Openvla's states are 8 wide; the column before the gripper is filled up with zeros.
        proprio=ops.cat(state[:, :6], np.zeros(len(state)), state[:, -1]),
        language=trajectory.language,
        keep=slice(1, -1),
    )


def calvin(episode: Episode) -> Trajectory:
    """CALVIN: relative actions already scaled to [-1, 1] (20 mm, 0.05 rad); gripper -1 / 1."""
    action = episode["action"]
    return Trajectory(
        # -1 and 1 become 0 and 1; a 0 in between counts as closed.
        action=ops.cat(action[:, :6], np.floor((action[:, 6] + 1) / 2)),
        proprio=episode["robot_obs"].astype(np.float32),
        language=episode["language"],
    )


def berkeley_rpt(episode: Episode) -> Trajectory:
    """Octo's rule: every third step of 30 Hz; the motion between those; the last has none."""
    joints, steps = episode["joints"], len(episode["joints"])
    return Trajectory(
        # The recorded gripper is 1 where it is closed.
        action=ops.cat(ops.state_delta(joints[:, :7], stride=3), 1 - episode["action"][:, -1]),
        proprio=ops.cat(joints, episode["gripper"].astype(np.float32)),
        language=episode["language"],
        keep=slice(0, 3 * ((steps - 1) // 3), 3),
    )


def gnm(episode: Episode) -> Trajectory:
    """Octo's rule: every third step; the way to the next of them, in the robot's frame.

    It is scaled as the recorded actions are: by the first action's length over the first step's.
    An episode that begins without a motion has no such scale, and is left out.
    """
    position, yaw = episode["position"], episode["yaw"].reshape(-1)
    moved = np.linalg.norm(position[1:2] - position[:1])
    scale = np.linalg.norm(episode["action"][0]) / moved if moved else 0.0
    way = ops.into_frame(ops.state_delta(position, stride=3), yaw)
    # With `last` = 0 nothing is kept, which leaves the episode out.
    last = 3 * ((len(position) - 1) // 3) if moved else 0
    state = episode["state"].astype(np.float32)
    return Trajectory(
        (way * scale).astype(np.float32), episode["language"], state, slice(0, last, 3)
    )


BRIDGE = {"state": "observation/state", "action": "action", "language": STEP}
BRIDGE_IMAGES = {"primary": "observation/image_0", "secondary": "observation/image_1"}
_ARM = {"action": "eef_pos", "state": "pos_euler", "gripper_binary": True}
# SimplerEnv's WidowX takes a gripper command of -1 (closed) or 1 (open).
BRIDGE_ORIG = DatasetSpec(BRIDGE_IMAGES, BRIDGE, bridge_from_second, (-1.0, 1.0), 5.0, **_ARM)
BRIDGE_DATASET = DatasetSpec(BRIDGE_IMAGES, BRIDGE, bridge, (-1.0, 1.0), 5.0, **_ARM)
CALVIN = DatasetSpec(
    images={"primary": "observation/rgb_static", "wrist": "observation/rgb_gripper"},
    features={
        # Converters differ in where they put the relative action.
        "action": ("rel_actions", "action/rel_actions", "action"),
        "robot_obs": "observation/robot_obs",
        "language": STEP,
    },
    standardize=calvin,
    gripper_env=(-1.0, 1.0),
    hz=30.0,
    action="eef_pos",
    state="robot_obs",
    gripper_binary=True,
    # Converted with --depth.
    depth={"primary": "observation/depth_static", "wrist": "observation/depth_gripper"},
)
_DROID = {
    "action": (take("action_dict/cartesian_velocity", 0, 6), take("action_dict/gripper_position")),
    "gripper": "closed",
    "state": (take("observation/cartesian_position"), take("observation/gripper_position")),
    "hz": 15.0,
}
TDROID = recipe(
    {"primary": "static_image"},
    action=(take("action", 0, 6), take("action", -1)),
    gripper="open_moving",
    state=(
        take("observation/cartesian_position", 0, 6),
        pad(),
        take("observation/gripper_position", -1),
    ),
    depth={"primary": "static_depth_image"},
    encoding=POS_EULER,
    hz=5.0,
)
# Steps without motion were taken out when the data were made.
LIBERO = recipe(
    {"primary": "image", "wrist": "wrist_image"},
    action=(take("action", 0, 6), take("action", -1)),
    gripper="closed_sign",
    state=(take("observation/state", 0, 6), pad(), take("observation/state", -2)),
    encoding=POS_EULER,
    hz=20.0,
)
# One arm's action of which a wheeled robot uses two numbers.
GNM = recipe(
    {"wrist": "image"},
    action=(take("action"), zeros(5)),
    gripper="always_closed",
    state=(take("observation/position"), zeros(3), take("observation/yaw"), pad(2)),
    encoding=POS_EULER,
)
_ALOHA = {
    "action": (take("action"),),
    "gripper": "as_recorded",
    "state": (take("observation/state"),),
    "stride": 5,  # of 50 Hz
    "hz": 10.0,
}
_TWO_ARMS = ("joint_pos_bimanual", "joint_bimanual")
_HIGH_AND_LOW = {"primary": "cam_high", "secondary": "cam_low", "wrist": "cam_right_wrist"}

SPECS: dict[str, DatasetSpec] = {
    "bridge_dataset": BRIDGE_DATASET,
    "bridge_orig": BRIDGE_ORIG,
    "calvin": CALVIN,
    "droid": recipe(
        {
            "primary": "exterior_image_1_left",
            "secondary": "exterior_image_2_left",
            "wrist": "wrist_image_left",
        },
        **_DROID,
        encoding=POS_QUAT,
        # As in openvla, either exterior camera may be the primary one.
        swap=("primary", "secondary"),
        # Openvla's test, there on the normalized arm alone; here a moving gripper counts, too.
        noop=1e-5,
    ),
    "droid_wipe": recipe(
        {"primary": "exterior_image_2_left", "wrist": "wrist_image_left"},
        **_DROID,
        encoding=POS_EULER,
    ),
    "tdroid_carrot_in_bowl": TDROID,
    "tdroid_pour_corn_in_pot": TDROID,
    "tdroid_flip_pot_upright": TDROID,
    "tdroid_move_object_onto_plate": TDROID,
    "tdroid_knock_object_over": TDROID,
    "tdroid_cover_object_with_towel": TDROID,
    "libero_spatial_no_noops": LIBERO,
    "libero_object_no_noops": LIBERO,
    "libero_goal_no_noops": LIBERO,
    "libero_10_no_noops": LIBERO,
    "berkeley_gnm_recon": replace(GNM, hz=3.0),
    "berkeley_gnm_cory_hall": replace(GNM, hz=5.0),
    "berkeley_gnm_sac_son": replace(GNM, hz=10.0),
    "gnm_dataset": DatasetSpec(
        images={"primary": "observation/image"},
        features={
            "position": "observation/position",
            "yaw": "observation/yaw",
            "state": "observation/state",
            "action": "action",
            "language": STEP,
        },
        standardize=gnm,
        gripper_env=(0.0, 1.0),
        action="nav_2d",
        state="pos_nav",
    ),
    "aloha_static_dataset": recipe(_HIGH_AND_LOW, **_ALOHA, encoding=_TWO_ARMS),
    "aloha_dagger_dataset": recipe(_HIGH_AND_LOW, **_ALOHA, encoding=_TWO_ARMS),
    "aloha_mobile_dataset": recipe(
        {"primary": "cam_high", "wrist": "cam_right_wrist"},
        **_ALOHA,
        encoding=("joint_pos_bimanual_nav", "joint_bimanual"),
    ),
}
