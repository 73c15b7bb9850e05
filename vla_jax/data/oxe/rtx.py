"""Google's own conversions in Open X-Embodiment: an action is a dict of named motions.

Source of the rules: octo and openvla, by dataset name; of the rates: Open X-Embodiment's overview.
"""

import numpy as np

from vla_jax.data import ops
from vla_jax.data.oxe.recipe import OBSERVED, pad, recipe, take, zeros
from vla_jax.data.spec import DatasetSpec, Episode, Trajectory

POS_EULER, POS_QUAT = ("eef_pos", "pos_euler"), ("eef_pos", "pos_quat")
JOINT, NONE = ("eef_pos", "joint"), ("eef_pos", "none")
_MOVE = (take("action/world_vector"), take("action/rotation_delta"))
_CLOSEDNESS = take("action/gripper_closedness_action")
_OPEN = take("action/open_gripper")
_BC_Z = (("xyz_residual", 3), ("axis_angle_residual", 3), ("target_close", 1))


def bridge_oxe(episode: Episode) -> Trajectory:
    """Bridge V2 as in Open X-Embodiment: executed motion; no first (all zero) and no last frame."""
    state = episode["state"]
    return Trajectory(
        action=ops.cat(ops.state_delta(state[:, :6]), episode["open"].reshape(-1)),
        proprio=ops.cat(state[:, :6], np.zeros(len(state)), state[:, -1]),
        language=episode["language"],
        keep=slice(1, -1),
    )


def _instruction(episode: Episode) -> str:
    # Instructions are recorded as code points, once a step.
    return ops.first_text(episode["observation/instruction"])


SPECS: dict[str, DatasetSpec] = {
    "fractal20220817_data": recipe(
        {"primary": "image"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closing",
        state=(take("observation/base_pose_tool_reached"), take("observation/gripper_closed")),
        language=OBSERVED,
        encoding=POS_QUAT,
        hz=3.0,
    ),
    "kuka": recipe(
        {"primary": "image"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closing",
        state=(
            # These two are recorded as zlib-compressed float32.
            take("observation/clip_function_input/base_pose_tool_reached", convert=ops.inflate),
            take("observation/gripper_closed", convert=ops.inflate),
        ),
        language=OBSERVED,
        encoding=POS_QUAT,
        hz=10.0,
    ),
    "bridge_oxe": DatasetSpec(
        {"primary": "observation/image", "secondary": "observation/image_1"},
        {"state": "observation/state", "open": "action/open_gripper", "language": OBSERVED},
        bridge_oxe,
        gripper_env=(-1.0, 1.0),
        hz=5.0,
        action="eef_pos",
        state="pos_euler",
        gripper_binary=True,
    ),
    "taco_play": recipe(
        {"primary": "rgb_static", "wrist": "rgb_gripper"},
        action=(take("action/rel_actions_world", 0, 6), take("action/rel_actions_world", -1)),
        gripper="open_sign",
        state=(take("observation/robot_obs", 0, 6), pad(), take("observation/robot_obs", 7, 8)),
        language=OBSERVED,
        depth={"primary": "depth_static", "wrist": "depth_gripper"},
        encoding=POS_EULER,
        hz=15.0,
    ),
    "jaco_play": recipe(
        {"primary": "image", "wrist": "image_wrist"},
        # No rotation is recorded; zeros keep the common width of 7.
        action=(take("action/world_vector"), zeros(3), _CLOSEDNESS),
        gripper="closing",
        state=(
            take("observation/end_effector_cartesian_pos", 0, 6),
            pad(),
            take("observation/end_effector_cartesian_pos", -1),
        ),
        language=OBSERVED,
        encoding=POS_EULER,
        hz=10.0,
    ),
    "berkeley_cable_routing": recipe(
        {"primary": "image", "secondary": "top_image", "wrist": "wrist45_image"},
        action=(*_MOVE, zeros(1)),
        gripper="always_closed",
        state=(take("observation/robot_state"), pad()),
        language=OBSERVED,
        encoding=JOINT,
        hz=10.0,
    ),
    "roboturk": recipe(
        {"primary": "front_rgb"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closed_clipped",
        state=(pad(8),),
        language=OBSERVED,
        encoding=NONE,
        hz=10.0,
    ),
    "nyu_door_opening_surprising_effectiveness": recipe(
        {"wrist": "image"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closing",
        state=(pad(8),),
        language=OBSERVED,
        encoding=NONE,
        hz=3.0,
    ),
    "viola": recipe(
        {"primary": "agentview_rgb", "wrist": "eye_in_hand_rgb"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closed_clipped",
        state=(take("observation/joint_states"), take("observation/gripper_states")),
        language=OBSERVED,
        encoding=JOINT,
        hz=20.0,
    ),
    "berkeley_autolab_ur5": recipe(
        {"primary": "image", "wrist": "hand_image"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="closing",
        # Before these 8 stand the arm's six joint angles.
        state=(take("observation/robot_state", 6, 14),),
        language=OBSERVED,
        depth={"primary": "image_with_depth"},
        encoding=POS_QUAT,
        hz=5.0,
    ),
    "toto": recipe(
        {"primary": "image"},
        action=(*_MOVE, _OPEN),
        gripper="open_flag",
        state=(take("observation/state"), pad()),
        language=OBSERVED,
        encoding=JOINT,
        hz=30.0,
    ),
    "language_table": recipe(
        {"primary": "rgb"},
        # The tool moves in a plane: two numbers, and no gripper.
        action=(take("action"), zeros(5)),
        gripper="always_open",
        state=(take("observation/effector_translation"), pad(6)),
        language=_instruction,
        features={"observation/instruction": "observation/instruction"},
        encoding=POS_EULER,
        hz=10.0,
    ),
    "columbia_cairlab_pusht_real": recipe(
        {"primary": "image", "wrist": "wrist_image"},
        action=(*_MOVE, _CLOSEDNESS),
        gripper="as_recorded",
        state=(take("observation/robot_state"), pad(6)),
        language=OBSERVED,
        encoding=POS_EULER,
        hz=10.0,
    ),
    # Only version 0.1.0 of the data is sound. The rotation stays an axis times an angle.
    "bc_z": recipe(
        {"primary": "image"},
        # `future` lists several waypoints, of which the first is the action.
        action=tuple(take(f"action/future/{name}", 0, count) for name, count in _BC_Z),
        gripper="closed_flag",
        state=(
            take("observation/present/xyz"),
            take("observation/present/axis_angle"),
            pad(),
            take("observation/present/sensed_close"),
        ),
        language=OBSERVED,
        encoding=POS_EULER,
        hz=10.0,
    ),
}
