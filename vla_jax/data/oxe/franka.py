"""Franka datasets that laboratories converted to RLDS themselves: an action is one vector.

Source of the rules: octo and openvla, by dataset name; of the rates: Open X-Embodiment's overview.
"""

from vla_jax.data import ops
from vla_jax.data.oxe.recipe import pad, recipe, take, zeros
from vla_jax.data.oxe.rtx import JOINT, NONE, POS_EULER, POS_QUAT
from vla_jax.data.spec import DatasetSpec

EXTERNAL = "_converted_externally_to_rlds"
_WRIST = {"primary": "image", "wrist": "wrist_image"}
_SIX = (take("action", 0, 6), take("action", -1))
# Rotations recorded as quaternions become angles, as all other datasets have them.
_QUATERNION = (take("action", 0, 3), take("action", 3, 7, convert=ops.euler_from_quaternion))

SPECS: dict[str, DatasetSpec] = {
    f"stanford_hydra_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=_SIX,
        gripper="closed",
        state=(
            take("observation/state", 0, 3),
            # Numbers 3 to 6 are the same rotation as a quaternion.
            take("observation/state", 7, 10),
            pad(),
            take("observation/state", -3, -2),
        ),
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"austin_buds_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=_SIX,
        gripper="closed_clipped",
        state=(take("observation/state", 0, 8),),
        encoding=JOINT,
        hz=20.0,
    ),
    f"austin_sailor_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=_SIX,
        gripper="closed_clipped",
        state=(take("observation/state"),),
        encoding=POS_QUAT,
        hz=20.0,
    ),
    f"austin_sirius_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=_SIX,
        gripper="closed_clipped",
        state=(take("observation/state"),),
        encoding=POS_QUAT,
        hz=20.0,
    ),
    "utaustin_mutex": recipe(
        _WRIST,
        action=_SIX,
        gripper="closed_clipped",
        state=(take("observation/state", 0, 8),),
        encoding=JOINT,
        hz=20.0,
    ),
    f"nyu_franka_play_dataset{EXTERNAL}": recipe(
        {"primary": "image", "secondary": "image_additional_view"},
        # Joint velocities stand before these, and a flag for the episode's end behind.
        action=(take("action", -8, -2), take("action", -2, -1)),
        gripper="open_sign",
        state=(take("observation/state", -6), pad(2)),
        depth={"primary": "depth", "secondary": "depth_additional_view"},
        encoding=POS_EULER,
        hz=3.0,
    ),
    f"maniskill_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=(take("action"),),
        gripper="as_recorded",
        state=(take("observation/tcp_pose"), take("observation/state", 7, 8)),
        depth={"primary": "depth", "wrist": "wrist_depth"},
        encoding=POS_QUAT,
        hz=20.0,
    ),
    f"furniture_bench_dataset{EXTERNAL}": recipe(
        _WRIST,
        action=(*_QUATERNION, take("action", -1)),
        gripper="closed_clipped",
        state=(take("observation/state", 0, 7), take("observation/state", -1)),
        encoding=POS_QUAT,
        hz=10.0,
    ),
    f"iamlab_cmu_pickup_insert{EXTERNAL}": recipe(
        _WRIST,
        action=(*_QUATERNION, take("action", 7, 8)),
        gripper="as_recorded",
        state=(take("observation/state", 0, 8),),
        encoding=JOINT,
        hz=20.0,
    ),
    "cmu_playing_with_food": recipe(
        {"primary": "image", "wrist": "finger_vision_1"},
        action=(*_QUATERNION, take("action", -1)),
        gripper="as_recorded",
        state=(take("observation/state"), pad(2)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"cmu_franka_exploration_dataset{EXTERNAL}": recipe(
        {"primary": "highres_image"},
        # The last number flags the end of the episode.
        action=(take("action", 0, -1),),
        gripper="as_recorded",
        state=(pad(8),),
        encoding=NONE,
        hz=10.0,
    ),
    "cmu_play_fusion": recipe(
        {"primary": "image"},
        action=(take("action", 0, 3), take("action", -4)),
        gripper="as_recorded",
        state=(take("observation/state"),),
        encoding=JOINT,
        hz=5.0,
    ),
    f"kaist_nonprehensile{EXTERNAL}": recipe(
        {"primary": "image"},
        # Behind the motion stand the controller's gains; there is no gripper to command.
        action=(take("action", 0, 6), zeros(1)),
        gripper="always_closed",
        state=(take("observation/state", -7), pad()),
        encoding=POS_QUAT,
        hz=10.0,
    ),
    f"stanford_robocook{EXTERNAL}": recipe(
        {"primary": "image_1", "secondary": "image_2"},
        action=(take("action"),),
        gripper="as_recorded",
        state=(take("observation/state", 0, 6), pad(), take("observation/state", -1)),
        depth={"primary": "depth_1", "secondary": "depth_2"},
        encoding=POS_EULER,
        hz=5.0,
    ),
    f"berkeley_rpt{EXTERNAL}": recipe(
        {"wrist": "hand_image"},
        action=(take("action"),),
        gripper="as_recorded",
        state=(take("observation/joint_pos"), take("observation/gripper")),
        encoding=("joint_pos", "joint"),
        hz=30.0,
    ),
    "roboset": recipe(
        {"primary": "image_left", "secondary": "image_right", "wrist": "image_wrist"},
        action=(take("action", 0, 7), take("action", -1)),
        gripper="closed_sign",
        state=(take("observation/state"),),
        encoding=("joint_pos", "joint"),
        hz=5.0,
    ),
    "fmb_dataset": recipe(
        {"primary": "image_side_1", "secondary": "image_side_2", "wrist": "image_wrist_1"},
        action=(take("action"),),
        gripper="as_recorded",
        state=(take("observation/eef_pose"), take("observation/state_gripper_pose")),
        depth={
            "primary": "image_side_1_depth",
            "secondary": "image_side_2_depth",
            "wrist": "image_wrist_1_depth",
        },
        encoding=POS_EULER,
        hz=10.0,
    ),
}
