"""What every dataset's actions and states are to be, written down by hand from octo and openvla.

An episode's feature number k (from 1, in the order of `features`) has the value 100 k + column +
step / 8, so that 203 below means: column 3 of the second feature. 0 is a column of zeros. The
gripper's column holds a track of its own.
"""

from dataclasses import dataclass

X = "_converted_externally_to_rlds"
OBS = "observation/natural_language_instruction"
STEP = "language_instruction"
SIX = (100, 101, 102, 103, 104, 105)
ROTATED = (100, 101, 102, "x", "y", "z")  # from the quaternion in columns 3 to 6

# How the gripper is recorded -> (recorded, 1 = open and 0 = closed), five steps.
TRACKS = {
    "R2A": ((0, 0.05, 1, 0, -1), (1, 1, 0, 0, 1)),
    "BIN": ((1, 0.6, 0.02, 0.5, 0.3), (1, 0, 0, 0.3, 0.3)),
    "1-clip01": ((-1, 1, 0.25, 2, 0), (1, 0, 0.75, 0, 1)),
    "clip01": ((-1, 1, 0.25, 2, 0), (0, 1, 0.25, 1, 0)),
    "raw": ((-1, 1, 0.25, 2, 0), (-1, 1, 0.25, 2, 0)),
    "1-x": ((-1, 1, 0.25, 2, 0), (2, 0, 0.75, -1, 1)),
    "1-x/255": ((0, 255, 127.5, 63.75, 0), (1, 0, 0.5, 0.75, 1)),
    "0": (None, (0, 0, 0, 0, 0)),
    "1": (None, (1, 1, 1, 1, 1)),
}


@dataclass(frozen=True)
class Row:
    """One dataset.

    `features`: name -> columns, 0 for a scalar. `arm`: the action without its last number.
    `gripper`: key of TRACKS, then its feature's number and column. `state`: openvla's; octo's is
    `octo`, or the same without `padding` columns of zeros. `blank`: octo hides the text.
    """

    features: dict[str, int]
    arm: tuple
    gripper: tuple
    state: tuple | None = None
    padding: tuple[int, ...] = ()
    octo: tuple | None = None
    blank: bool = False
    text: str = STEP
    octo_gripper: str = ""


def obs(**widths):
    return {f"observation/{name}": width for name, width in widths.items()}


def run(first, count):
    return tuple(range(first, first + count))


MOVE = {"action/world_vector": 3, "action/rotation_delta": 3}
MOVED = (100, 101, 102, 200, 201, 202)
CLOSE, CLOSE0 = (
    {"action/gripper_closedness_action": 1},
    {"action/gripper_closedness_action": 0},
)
NOTHING = (0,) * 8
ALL = run(0, 8)
A7, A8 = {"action": 7}, {"action": 8}
S7 = obs(state=7)
POSE = (*run(200, 6), 0, 206)  # six numbers, openvla's padding, the gripper

ROWS = {
    "fractal20220817_data": Row(
        MOVE | CLOSE | obs(base_pose_tool_reached=7, gripper_closed=1),
        MOVED, ("R2A", 3, 0), (*run(400, 7), 500), text=OBS),
    "kuka": Row(
        MOVE | CLOSE | {"observation/clip_function_input/base_pose_tool_reached": 7}
        | obs(gripper_closed=1),
        MOVED, ("R2A", 3, 0), (*run(400, 7), 500), text=OBS, blank=True),
    "taco_play": Row(
        {"action/rel_actions_world": 7} | obs(robot_obs=15),
        SIX, ("clip01", 1, 6), (*run(200, 6), 0, 207), (6,), text=OBS),
    "jaco_play": Row(
        {"action/world_vector": 3} | CLOSE | obs(end_effector_cartesian_pos=7),
        (100, 101, 102, 0, 0, 0), ("R2A", 2, 0), (*run(300, 6), 0, 306), (6,), text=OBS),
    "berkeley_cable_routing": Row(
        MOVE | obs(robot_state=7), MOVED, ("0",), (*run(300, 7), 0), (7,), text=OBS, blank=True),
    "roboturk": Row(MOVE | CLOSE, MOVED, ("1-clip01", 3, 0), NOTHING, ALL, text=OBS, blank=True),
    "nyu_door_opening_surprising_effectiveness": Row(
        MOVE | CLOSE, MOVED, ("R2A", 3, 0), NOTHING, ALL, text=OBS, blank=True),
    "viola": Row(
        MOVE | CLOSE0 | obs(joint_states=7, gripper_states=1),
        MOVED, ("1-clip01", 3, 0), (*run(400, 7), 500), text=OBS, blank=True),
    "berkeley_autolab_ur5": Row(
        MOVE | CLOSE0 | obs(robot_state=15), MOVED, ("R2A", 3, 0), run(406, 8), text=OBS),
    "toto": Row(
        MOVE | {"action/open_gripper": 0} | obs(state=7),
        MOVED, ("raw", 3, 0), (*run(400, 7), 0), (7,), text=OBS, blank=True),
    "columbia_cairlab_pusht_real": Row(
        MOVE | CLOSE0 | obs(robot_state=2),
        MOVED, ("raw", 3, 0), (400, 401, 0, 0, 0, 0, 0, 0), run(2, 6), text=OBS),
    f"stanford_kuka_multimodal_dataset{X}": Row(
        {"action": 4} | obs(ee_position=3, ee_orientation=4),
        (100, 101, 102, 0, 0, 0), ("raw", 1, 3), (*run(200, 3), *run(300, 4), 0), (7,)),
    f"nyu_rot_dataset{X}": Row(A7 | S7, SIX, ("raw", 1, 6), POSE, (6,)),
    f"stanford_hydra_dataset{X}": Row(
        A7 | obs(state=27), SIX, ("1-x", 1, 6),
        (200, 201, 202, 207, 208, 209, 0, 224), (6,), blank=True),
    f"austin_buds_dataset{X}": Row(
        A7 | obs(state=24), SIX, ("1-clip01", 1, 6), run(200, 8), blank=True),
    f"nyu_franka_play_dataset{X}": Row(
        {"action": 15} | obs(state=13), run(107, 6), ("clip01", 1, 13),
        (*run(207, 6), 0, 0), (6, 7), blank=True),
    f"maniskill_dataset{X}": Row(
        A7 | obs(tcp_pose=7, state=18), SIX, ("raw", 1, 6), (*run(200, 7), 307)),
    f"furniture_bench_dataset{X}": Row(
        A8 | obs(state=35), ROTATED, ("1-clip01", 1, 7), (*run(200, 7), 234)),
    f"cmu_franka_exploration_dataset{X}": Row(A8, SIX, ("raw", 1, 6), NOTHING, ALL),
    f"ucsd_kitchen_dataset{X}": Row(
        A8 | obs(state=21), SIX, ("raw", 1, 6), (*run(200, 7), 0), (7,)),
    f"ucsd_pick_and_place_dataset{X}": Row(
        {"action": 4} | S7, (100, 101, 102, 0, 0, 0), ("raw", 1, 3), POSE, (6,)),
    f"austin_sailor_dataset{X}": Row(
        A7 | obs(state=8), SIX, ("1-clip01", 1, 6), run(200, 8), blank=True),
    f"austin_sirius_dataset{X}": Row(
        A7 | obs(state=8), SIX, ("1-clip01", 1, 6), run(200, 8), blank=True),
    "bc_z": Row(
        {"action/future/xyz_residual": 30, "action/future/axis_angle_residual": 30,
         "action/future/target_close": 10, "observation/present/xyz": 3,
         "observation/present/axis_angle": 3, "observation/present/sensed_close": 1},
        MOVED, ("1-x", 3, 0), (400, 401, 402, 500, 501, 502, 0, 600), (6,), text=OBS),
    f"utokyo_pr2_opening_fridge{X}": Row(A8 | S7, SIX, ("raw", 1, 6), POSE, (6,)),
    f"utokyo_pr2_tabletop_manipulation{X}": Row(A8 | S7, SIX, ("raw", 1, 6), POSE, (6,)),
    f"utokyo_xarm_pick_and_place{X}": Row(
        A7 | obs(end_effector_pose=6), SIX, ("raw", 1, 6), (*run(200, 6), 0, 0), octo=()),
    f"utokyo_xarm_bimanual{X}": Row(
        {"action": 14} | obs(pose_r=6, end_effector_pose=12), run(107, 6), ("raw", 1, 13),
        (*run(200, 6), 0, 0), octo=run(300, 12)),
    "robo_net": Row(
        {"action": 5} | obs(state=5), (100, 101, 102, 103, 0, 0), ("raw", 1, 4),
        (200, 201, 202, 203, 0, 0, 0, 204), (6,)),
    f"berkeley_mvp{X}": Row(
        A8 | obs(pose=7, gripper=0), run(100, 7), ("raw", 1, 7), (*run(200, 7), 300),
        octo_gripper="1-x"),
    f"kaist_nonprehensile{X}": Row(
        {"action": 20} | obs(state=21), SIX, ("0",), (*run(214, 7), 0), (7,)),
    f"stanford_mask_vit{X}": Row(
        {"action": 5} | obs(end_effector_pose=5), (100, 101, 102, 103, 0, 0), ("raw", 1, 4),
        (200, 201, 202, 203, 0, 0, 0, 204), (6,)),
    f"tokyo_u_lsmo{X}": Row(A7 | obs(state=13), SIX, ("raw", 1, 6), (*run(200, 6), 0, 212), (6,)),
    f"dlr_sara_pour{X}": Row(
        A7 | obs(state=6), SIX, ("raw", 1, 6), (*run(200, 6), 0, 0), (6, 7)),
    f"dlr_sara_grid_clamp{X}": Row(
        A7 | obs(state=12), SIX, ("raw", 1, 6), (*run(200, 6), 0, 0), (6, 7)),
    f"dlr_edan_shared_control{X}": Row(
        A7 | obs(state=7), SIX, ("1-x", 1, 6), (*run(200, 7), 0), (7,)),
    f"asu_table_top{X}": Row(
        A7 | {"ground_truth_states/EE": 6} | obs(state=7), SIX, ("raw", 1, 6),
        (*run(200, 6), 0, 306), (6,)),
    f"stanford_robocook{X}": Row(A7 | S7, SIX, ("raw", 1, 6), POSE, (6,)),
    "imperialcollege_sawyer_wrist_cam": Row(
        A8 | obs(state=1), SIX, ("raw", 1, 6), (0, 0, 0, 0, 0, 0, 0, 200), octo=()),
    f"iamlab_cmu_pickup_insert{X}": Row(
        A8 | obs(state=20), ROTATED, ("raw", 1, 7), run(200, 8)),
    "uiuc_d3field": Row({"action": 3}, (100, 101, 102, 0, 0, 0), ("0",), NOTHING, ALL),
    "utaustin_mutex": Row(
        A7 | obs(state=24), SIX, ("1-clip01", 1, 6), run(200, 8), blank=True),
    "berkeley_fanuc_manipulation": Row(
        {"action": 6} | obs(state=13), SIX, ("1-x", 2, 6), (*run(200, 6), 0, "g"), (6,)),
    "cmu_playing_with_food": Row(
        {"action": 9} | obs(state=6), ROTATED, ("raw", 1, 8), (*run(200, 6), 0, 0), (6, 7)),
    "cmu_play_fusion": Row(
        {"action": 9} | obs(state=8), (100, 101, 102, 105, 106, 107), ("raw", 1, 8), run(200, 8)),
    "cmu_stretch": Row(
        A8 | obs(state=4), SIX, ("raw", 1, 6), (200, 201, 202, 0, 0, 0, 0, 203), (6,)),
    "fmb_dataset": Row(
        A7 | obs(eef_pose=7, state_gripper_pose=0), SIX, ("raw", 1, 6), (*run(200, 7), 300)),
    "dobbe": Row(A7 | S7, SIX, ("raw", 1, 6), run(200, 7)),
    "roboset": Row(A8 | obs(state=8), run(100, 7), ("1-clip01", 1, 7), run(200, 8)),
    "rh20t": Row(
        {"action/tcp_base": 6, "action/gripper": 0} | obs(tcp_base=6, gripper_width=0),
        SIX, ("raw", 2, 0), (*run(300, 6), 400)),
    "mujoco_manip": Row(A7, SIX, ("1-x/255", 1, 6)),
    **{f"berkeley_gnm_{name}": Row(
        {"action": 2} | obs(position=2, yaw=1), (100, 101, 0, 0, 0, 0), ("0",),
        (200, 201, 0, 0, 0, 300, 0, 0)) for name in ("recon", "cory_hall", "sac_son")},
    **{name: Row(
        {"action_dict/cartesian_velocity": 6, "action_dict/gripper_position": 1}
        | obs(cartesian_position=6, gripper_position=1),
        SIX, ("1-x", 2, 0), (*run(300, 6), 400)) for name in ("droid", "droid_wipe")},
    **{f"tdroid_{name}": Row(
        A7 | obs(cartesian_position=6, gripper_position=1), SIX, ("BIN", 1, 6),
        (*run(200, 6), 0, 300))
       for name in ("carrot_in_bowl", "pour_corn_in_pot", "flip_pot_upright",
                    "move_object_onto_plate", "knock_object_over", "cover_object_with_towel")},
    **{f"libero_{name}_no_noops": Row(
        A7 | obs(state=8), SIX, ("1-clip01", 1, 6), (*run(200, 6), 0, 206, 207))
       for name in ("spatial", "object", "goal", "10")},
}  # fmt: skip
# Those with a rule that is more than columns; they have tests of their own.
ELSEWHERE = {
    "bridge_dataset", "bridge_orig", "bridge_oxe", "language_table", "gnm_dataset", "calvin",
    "aloha_static_dataset", "aloha_dagger_dataset", "aloha_mobile_dataset", f"berkeley_rpt{X}",
}  # fmt: skip
