"""Other arms whose laboratories converted their data to RLDS themselves: an action is one vector.

Source of the rules: octo and openvla, by dataset name; of the rates: Open X-Embodiment's overview.
"""

from vla_jax.data.oxe.franka import EXTERNAL
from vla_jax.data.oxe.recipe import pad, recipe, take, zeros
from vla_jax.data.oxe.rtx import JOINT, NONE, POS_EULER, POS_QUAT
from vla_jax.data.spec import DatasetSpec

_WHOLE, _BUT_LAST = (take("action"),), (take("action", 0, -1),)
# Arms that do not turn, or only about the vertical, get zeros for the missing angles.
_XYZ = (take("action", 0, 3), zeros(3), take("action", -1))
_XYZ_YAW = (take("action", 0, 4), zeros(2), take("action", -1))
_STATE = (take("observation/state", 0, 6), pad(), take("observation/state", -1))

SPECS: dict[str, DatasetSpec] = {
    f"stanford_kuka_multimodal_dataset{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_XYZ,
        gripper="as_recorded",
        state=(take("observation/ee_position"), take("observation/ee_orientation"), pad()),
        depth={"primary": "depth_image"},
        encoding=POS_QUAT,
        hz=20.0,
    ),
    f"nyu_rot_dataset{EXTERNAL}": recipe(
        {"primary": "image"},
        action=(take("action", 0, 7),),
        gripper="as_recorded",
        state=_STATE,
        encoding=POS_EULER,
        hz=3.0,
    ),
    # Its actions end with a flag for the end of the episode.
    f"ucsd_kitchen_dataset{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_BUT_LAST,
        gripper="as_recorded",
        state=(take("observation/state", 0, 7), pad()),
        encoding=JOINT,
        hz=2.0,
    ),
    f"ucsd_pick_and_place_dataset{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_XYZ,
        gripper="as_recorded",
        state=_STATE,
        encoding=POS_EULER,
        hz=3.0,
    ),
    f"utokyo_pr2_opening_fridge{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_BUT_LAST,
        gripper="as_recorded",
        state=_STATE,
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"utokyo_pr2_tabletop_manipulation{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_BUT_LAST,
        gripper="as_recorded",
        state=_STATE,
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"utokyo_xarm_pick_and_place{EXTERNAL}": recipe(
        {"primary": "image", "secondary": "image2", "wrist": "hand_image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("observation/end_effector_pose"), pad(2)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    # Two arms; the last seven numbers are the right one's.
    f"utokyo_xarm_bimanual{EXTERNAL}": recipe(
        {"primary": "image"},
        action=(take("action", -7),),
        gripper="as_recorded",
        state=(take("observation/pose_r"), pad(2)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    "robo_net": recipe(
        {"primary": "image", "secondary": "image1"},
        action=_XYZ_YAW,
        gripper="as_recorded",
        state=(take("observation/state", 0, 4), zeros(2), pad(), take("observation/state", -1)),
        encoding=POS_EULER,
        hz=1.0,
    ),
    f"berkeley_mvp{EXTERNAL}": recipe(
        {"wrist": "hand_image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("observation/pose"), take("observation/gripper")),
        encoding=("joint_pos", "pos_quat"),
        hz=5.0,
    ),
    # Steps end when the robot has come to rest, so there is no rate.
    f"stanford_mask_vit{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_XYZ_YAW,
        gripper="as_recorded",
        state=(
            take("observation/end_effector_pose", 0, 4),
            zeros(2),
            pad(),
            take("observation/end_effector_pose", -1),
        ),
        encoding=POS_EULER,
    ),
    f"tokyo_u_lsmo{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=_STATE,
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"dlr_sara_pour{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("observation/state"), pad(2)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"dlr_sara_grid_clamp{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("observation/state", 0, 6), pad(2)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    f"dlr_edan_shared_control{EXTERNAL}": recipe(
        {"primary": "image"},
        action=(take("action", 0, 6), take("action", -1)),
        gripper="closed",
        state=(take("observation/state"), pad()),
        encoding=POS_EULER,
        hz=5.0,
    ),
    f"asu_table_top{EXTERNAL}": recipe(
        {"primary": "image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("ground_truth_states/EE"), pad(), take("observation/state", -1)),
        encoding=POS_EULER,
        hz=12.5,
    ),
    "imperialcollege_sawyer_wrist_cam": recipe(
        {"primary": "image", "wrist": "wrist_image"},
        action=_BUT_LAST,
        gripper="as_recorded",
        state=(pad(7), take("observation/state")),
        encoding=NONE,
        hz=10.0,
    ),
    # The published data are reported to be broken.
    "uiuc_d3field": recipe(
        {"primary": "image_1", "secondary": "image_2"},
        action=(take("action"), zeros(4)),
        gripper="always_closed",
        state=(pad(8),),
        depth={"primary": "depth_1", "secondary": "depth_2"},
        encoding=NONE,
        hz=1.0,
    ),
    # No gripper command was recorded; the gripper's state stands in.
    "berkeley_fanuc_manipulation": recipe(
        {"primary": "image", "wrist": "wrist_image"},
        action=(take("action"), take("observation/state", 6, 7)),
        gripper="closed",
        state=(take("observation/state", 0, 6), pad(), take("observation/state", 6, 7)),
        encoding=JOINT,
        hz=10.0,
    ),
    "cmu_stretch": recipe(
        {"primary": "image"},
        action=_BUT_LAST,
        gripper="as_recorded",
        state=(take("observation/state", 0, 3), zeros(3), pad(), take("observation/state", -1)),
        encoding=POS_EULER,
        hz=10.0,
    ),
    # Its only camera is on the gripper; openvla has it in the primary place.
    "dobbe": recipe(
        {"primary": "wrist_image"},
        action=_WHOLE,
        gripper="as_recorded",
        state=(take("observation/state"),),
        encoding=POS_EULER,
        hz=3.75,
    ),
    "rh20t": recipe(
        {"primary": "image_front", "secondary": "image_side_right", "wrist": "image_wrist"},
        action=(take("action/tcp_base"), take("action/gripper")),
        gripper="as_recorded",
        state=(take("observation/tcp_base"), take("observation/gripper_width")),
        encoding=POS_EULER,
        hz=10.0,
    ),
    "mujoco_manip": recipe(
        {"primary": "image"},
        action=(take("action", 0, 6), take("action", -1)),
        gripper="closed_byte",
        encoding=POS_EULER,
    ),
}
