"""Every dataset's rule on made-up episodes, against what oxe_table says its columns are."""

from typing import Any

import numpy as np
import pytest

from tests.data.oxe_table import ELSEWHERE, OBS, ROWS, STEP, TRACKS, Row
from vla_jax.cameras import CAMERAS
from vla_jax.data.oxe import MIXTURES, SPECS, get_spec
from vla_jax.data.spec import ACTION_ENCODINGS, STATE_ENCODINGS
from vla_jax.data.units.gripper import RECORDINGS

STEPS = 5
HALF = np.sqrt(0.5)
# (x, y, z, w) of one step each, and the turns about x, y, z that they are.
QUATERNIONS = np.array(
    [[0, 0, 0, 1], [HALF, 0, 0, HALF], [0, 0, HALF, HALF], [0, 0.5, 0, np.sqrt(0.75)], [1, 0, 0, 0]]
)
ANGLES = {
    "x": [0, np.pi / 2, 0, 0, np.pi],
    "y": [0, 0, 0, np.pi / 3, 0],
    "z": [0, 0, np.pi / 2, 0, 0],
}


def make_episode(row: Row) -> dict[str, np.ndarray]:
    episode = {}
    for k, (name, width) in enumerate(row.features.items(), 1):
        columns = 100 * k + np.arange(max(width, 1)) + np.arange(STEPS)[:, None] / 8
        episode[name] = columns.astype(np.float32)
    if row.arm[3] == "x":
        episode["action"][:, 3:7] = QUATERNIONS
    recorded = TRACKS[row.gripper[0]][0]
    if recorded is not None:
        _, k, column = row.gripper
        list(episode.values())[k - 1][:, column] = recorded
    scalars = {name: episode[name][:, 0] for name, width in row.features.items() if not width}
    return episode | scalars | {row.text: np.array(["do it"] * STEPS, object)}


def columns(numbers, row: Row) -> np.ndarray:
    collected = []
    for number in numbers:
        if number in ANGLES:
            collected.append(ANGLES[number])
        elif number == "g":
            collected.append(TRACKS[row.gripper[0]][0])
        else:
            collected.append(number + np.arange(STEPS) / 8 if number else np.zeros(STEPS))
    return np.array(collected, np.float32).T


@pytest.mark.parametrize("variant", ["openvla", "octo"])
@pytest.mark.parametrize("name", ROWS)
def test_columns(name, variant):
    row, spec = ROWS[name], get_spec(name, variant)
    octo = variant == "octo"
    episode = make_episode(row)
    assert set(spec.features) <= set(episode)
    standardized = spec.standardize({short: episode[short] for short in spec.features})
    convention = row.octo_gripper if octo and row.octo_gripper else row.gripper[0]
    np.testing.assert_allclose(
        standardized.action[:, :-1], columns(row.arm, row), rtol=0, atol=2e-7
    )
    np.testing.assert_array_equal(
        standardized.action[:, -1], np.array(TRACKS[convention][1], np.float32)
    )
    state = row.state
    if octo and row.octo is not None:
        state = row.octo
    elif octo and state:
        state = [number for i, number in enumerate(state) if i not in row.padding]
    if state:
        assert standardized.proprio is not None
        np.testing.assert_array_equal(standardized.proprio, columns(state, row))
        assert standardized.proprio.dtype == np.float32
    else:
        assert standardized.proprio is None
    assert standardized.action.dtype == np.float32
    assert standardized.keep == slice(None, None, 1)
    text = (
        standardized.language
        if isinstance(standardized.language, str)
        else standardized.language[0]
    )
    assert text == ("" if octo and row.blank else "do it")


def test_the_table_is_complete():
    assert len(SPECS) == 76  # 75 names of the two registries, and CALVIN
    assert set(SPECS) == set(ROWS) | ELSEWHERE
    assert not set(ROWS) & ELSEWHERE
    blank = [name for name, row in ROWS.items() if row.blank]
    assert len(blank) == 12
    for name in blank:
        rule: Any = get_spec(name, "octo").standardize
        assert rule.language == ""
        assert get_spec(name).features[ROWS[name].text] == ROWS[name].text


@pytest.mark.parametrize("variant", ["default", "openvla", "octo"])
def test_every_spec_is_well_formed(variant):
    for name in SPECS:
        spec = get_spec(name, variant)
        assert spec.images, name
        assert set(spec.images) <= set(CAMERAS), name
        assert set(spec.depth) <= set(spec.images), name
        assert set(spec.swap or ()) <= set(spec.images), name
        assert spec.gripper_env is not None, name
        assert spec.gripper_env[0] != spec.gripper_env[1], name
        assert spec.action in ACTION_ENCODINGS, name
        assert spec.state in STATE_ENCODINGS, name
        assert spec.hz is None or spec.hz > 0, name


# Cameras (primary, secondary, wrist) that are not "image" alone, and encodings that are not
# eef_pos; by hand from the registries.
CAMERA_NAMES = {
    "bridge_dataset": ("image_0", "image_1", None),
    "bridge_orig": ("image_0", "image_1", None),
    "bridge_oxe": ("image", "image_1", None),
    "taco_play": ("rgb_static", None, "rgb_gripper"),
    "jaco_play": ("image", None, "image_wrist"),
    "berkeley_cable_routing": ("image", "top_image", "wrist45_image"),
    "roboturk": ("front_rgb", None, None),
    "nyu_door_opening_surprising_effectiveness": (None, None, "image"),
    "viola": ("agentview_rgb", None, "eye_in_hand_rgb"),
    "berkeley_autolab_ur5": ("image", None, "hand_image"),
    "language_table": ("rgb", None, None),
    "columbia_cairlab_pusht_real": ("image", None, "wrist_image"),
    "stanford_hydra_dataset_x": ("image", None, "wrist_image"),
    "austin_buds_dataset_x": ("image", None, "wrist_image"),
    "nyu_franka_play_dataset_x": ("image", "image_additional_view", None),
    "maniskill_dataset_x": ("image", None, "wrist_image"),
    "furniture_bench_dataset_x": ("image", None, "wrist_image"),
    "cmu_franka_exploration_dataset_x": ("highres_image", None, None),
    "austin_sailor_dataset_x": ("image", None, "wrist_image"),
    "austin_sirius_dataset_x": ("image", None, "wrist_image"),
    "utokyo_xarm_pick_and_place_x": ("image", "image2", "hand_image"),
    "robo_net": ("image", "image1", None),
    "berkeley_mvp_x": (None, None, "hand_image"),
    "berkeley_rpt_x": (None, None, "hand_image"),
    "stanford_robocook_x": ("image_1", "image_2", None),
    "imperialcollege_sawyer_wrist_cam": ("image", None, "wrist_image"),
    "iamlab_cmu_pickup_insert_x": ("image", None, "wrist_image"),
    "uiuc_d3field": ("image_1", "image_2", None),
    "utaustin_mutex": ("image", None, "wrist_image"),
    "berkeley_fanuc_manipulation": ("image", None, "wrist_image"),
    "cmu_playing_with_food": ("image", None, "finger_vision_1"),
    "aloha_static_dataset": ("cam_high", "cam_low", "cam_right_wrist"),
    "aloha_dagger_dataset": ("cam_high", "cam_low", "cam_right_wrist"),
    "aloha_mobile_dataset": ("cam_high", None, "cam_right_wrist"),
    "fmb_dataset": ("image_side_1", "image_side_2", "image_wrist_1"),
    "dobbe": ("wrist_image", None, None),
    "roboset": ("image_left", "image_right", "image_wrist"),
    "rh20t": ("image_front", "image_side_right", "image_wrist"),
    "droid": ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"),
    "droid_wipe": ("exterior_image_2_left", None, "wrist_image_left"),
    "calvin": ("rgb_static", None, "rgb_gripper"),
}
ENCODINGS = {
    "berkeley_mvp_x": "joint_pos",
    "berkeley_rpt_x": "joint_pos",
    "roboset": "joint_pos",
    "gnm_dataset": "nav_2d",
    "aloha_static_dataset": "joint_pos_bimanual",
    "aloha_dagger_dataset": "joint_pos_bimanual",
    "aloha_mobile_dataset": "joint_pos_bimanual_nav",
}


def short(name: str) -> str:
    return name.replace("_converted_externally_to_rlds", "_x")


def test_cameras():
    for name, spec in SPECS.items():
        expected = CAMERA_NAMES.get(short(name), ("image", None, None))
        if name.startswith("libero"):
            expected = ("image", None, "wrist_image")
        elif name.startswith("tdroid"):
            expected = ("static_image", None, None)
        elif name.startswith("berkeley_gnm"):
            expected = (None, None, "image")
        named = zip(CAMERAS, expected, strict=True)
        assert spec.images == {role: f"observation/{n}" for role, n in named if n}, name
    assert get_spec("dobbe", "octo").images == {"wrist": "observation/wrist_image"}


def test_action_encodings():
    for name, spec in SPECS.items():
        assert spec.action == ENCODINGS.get(short(name), "eef_pos"), name
    assert ACTION_ENCODINGS["eef_pos"].mask == [True] * 6 + [False]
    assert ACTION_ENCODINGS["joint_pos"].mask == [True] * 7 + [False]
    assert ACTION_ENCODINGS["joint_pos_bimanual"].mask == ([True] * 6 + [False]) * 2
    assert ACTION_ENCODINGS["nav_2d"].mask == [True] * 2
    mobile = ([True] * 6 + [False]) * 2 + [True] * 2
    assert ACTION_ENCODINGS["joint_pos_bimanual_nav"].mask == mobile


def test_binary_grippers_are_binary_at_the_ends():
    for name, convention in RECORDINGS.items():
        if convention.binary:
            ends = np.array([1, 0, -1, 1] if "sign" in name or name == "closing" else [1, 0, 0, 1])
            assert set(convention.to_open(ends.astype(np.float32))) <= {0, 1}, name


def test_an_unknown_spec_is_told_with_the_nearest():
    with pytest.raises(KeyError, match=r"did you mean 'bridge_dataset'.*calvin"):
        get_spec("bridge_datset")
    with pytest.raises(KeyError, match=r"no variant 'open_vla'.*openvla"):
        get_spec("kuka", "open_vla")


def test_instructions_of_google_datasets_are_in_the_observation():
    observed = {name for name, row in ROWS.items() if row.text == OBS}
    assert {"fractal20220817_data", "kuka", "bc_z"} <= observed
    for name in set(ROWS) - observed:
        assert get_spec(name).features[STEP] == STEP


def test_mixtures_name_known_datasets():
    for variant, mixtures in MIXTURES.items():
        for mixture in mixtures.values():
            for name, weight in mixture.items():
                assert get_spec(name, variant)
                assert weight > 0
