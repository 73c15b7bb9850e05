"""Named mixtures, by hand from octo's and openvla's lists, and where their datasets lie."""

import pytest

from configs import base, oxe, oxe_robovlms
from vla_jax.config import ConfigError, resolve
from vla_jax.data.oxe import MIXTURES, SPECS, get_mixture
from vla_jax.data.oxe.folders import find_folder, mixture_entries
from vla_jax.data.oxe.quirks import QUIRKS

X = "_converted_externally_to_rlds"
FRACTAL, KUKA = 0.54087122203, 0.8341046294
# Weights in the order: V bridge_rt_1, V rtx, V rtx_franka, V oxe_magic_soup, V .._plus,
# V .._plus_minus, O rtx, O rtx_franka, O oxe_magic_soup, O oxe_flex_act_soup; 0 is absent.
COLUMNS = [
    *((("openvla", name)) for name in (
        "bridge_rt_1", "rtx", "rtx_franka", "oxe_magic_soup", "oxe_magic_soup_plus",
        "oxe_magic_soup_plus_minus")),
    *((("octo", name)) for name in (
        "rtx", "rtx_franka", "oxe_magic_soup", "oxe_flex_act_soup")),
]  # fmt: skip
WEIGHTS = {
    "bridge_dataset":                               (0, 0, 0, 0, 0, 0, 1, 1, 1, 1),
    "bridge_orig":                                  (1, 1, 1, 1, 1, 1, 0, 0, 0, 0),
    "fractal20220817_data": (1, FRACTAL, FRACTAL, FRACTAL, FRACTAL, 1, *(FRACTAL,) * 4),
    "kuka":                                         (0, *(KUKA,) * 9),
    "taco_play":                                    (0, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    "jaco_play":                                    (0, 2, 2, 1, 1, 1, 2, 2, 1, 1),
    "berkeley_cable_routing":                       (0, 3, 3, 1, 1, 1, 3, 3, 1, 1),
    "roboturk":                                     (0, 1, 1, 2, 2, 2, 1, 1, 2, 2),
    "nyu_door_opening_surprising_effectiveness":    (0, 0, 0, 0, 0, 0, 5, 5, 1, 1),
    "viola":                                        (0, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    "berkeley_autolab_ur5":                         (0, 1, 1, 2, 2, 2, 1, 1, 2, 2),
    "toto":                                         (0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    f"stanford_hydra_dataset{X}":                   (0, 0, 1, 2, 2, 2, 0, 1, 2, 2),
    f"austin_buds_dataset{X}":                      (0, 0, 3, 1, 1, 1, 0, 3, 1, 1),
    f"nyu_franka_play_dataset{X}":                  (0, 0, 3, 3, 3, 3, 0, 3, 3, 3),
    f"maniskill_dataset{X}":                        (0, 0, 0.1, 0, 0, 0, 0, 0.1, 0, 0),
    f"furniture_bench_dataset{X}":                  (0, 0, *(0.1,) * 4, 0, *(0.1,) * 3),
    f"cmu_franka_exploration_dataset{X}":           (0, 0, 5, 0, 0, 0, 0, 5, 0, 0),
    f"austin_sailor_dataset{X}":                    (0, 0, 1, 1, 1, 1, 0, 1, 1, 1),
    f"austin_sirius_dataset{X}":                    (0, 0, 1, 1, 1, 1, 0, 1, 1, 1),
    f"berkeley_rpt{X}":                             (0, 0, 1, 0, 0, 0, 0, 1, 0, 0),
    f"kaist_nonprehensile{X}":                      (0, 0, 3, 0, 0, 0, 0, 3, 0, 0),
    f"stanford_robocook{X}":                        (0, 0, 1, 0, 0, 0, 0, 1, 0, 0),
    f"iamlab_cmu_pickup_insert{X}":                 (0, 0, 1, 1, 1, 1, 0, 1, 1, 1),
    "utaustin_mutex":                               (0, 0, 1, 1, 1, 1, 0, 1, 1, 1),
    "cmu_play_fusion":                              (0, 0, 1, 0, 0, 0, 0, 1, 0, 0),
    "language_table":                               (0, 0, 0, 0.1, 0.1, 0, 0, 0, 0.1, 0.1),
    f"ucsd_kitchen_dataset{X}":                     (0, 0, 0, 2, 2, 2, 0, 0, 2, 2),
    "bc_z":                                         (0, 0, 0, 0, 0.2, 0.2, 0, 0, 0.2, 0.2),
    f"dlr_edan_shared_control{X}":                  (0, 0, 0, 1, 1, 1, 0, 0, 1, 1),
    "berkeley_fanuc_manipulation":                  (0, 0, 0, 2, 2, 2, 0, 0, 2, 2),
    "cmu_stretch":                                  (0, 0, 0, 1, 1, 1, 0, 0, 1, 1),
    f"berkeley_mvp{X}":                             (0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
    "gnm_dataset":                                  (0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
    "aloha_static_dataset":                         (0, 0, 0, 0, 0, 0, 0, 0, 0, 3),
    "aloha_mobile_dataset":                         (0, 0, 0, 0, 0, 0, 0, 0, 0, 2),
    "dobbe":                                        (0, 0, 0, 0, 0.2, 0.2, 0, 0, 0, 1),
    "roboset":                                      (0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5),
    "rh20t":                                        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5),
    "fmb_dataset":                                  (0, 0, 0, 0, 1, 1, 0, 0, 0, 0),
    "droid":                                        (0, 0, 0, 0, 0.06, 0, 0, 0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_weights(column):
    variant, name = COLUMNS[column]
    expected = {dataset: w[column] for dataset, w in WEIGHTS.items() if w[column]}
    mixture = get_mixture(name, variant)
    assert mixture == expected
    # In their order, which the numbers of a batch's datasets follow.
    first = ["bridge_orig", "fractal20220817_data"]
    if name != "bridge_rt_1":
        bridge = {"openvla": "bridge_orig", "octo": "bridge_dataset"}[variant]
        first = ["fractal20220817_data", "kuka", bridge, "taco_play"]
    assert list(mixture)[: len(first)] == first


def test_the_small_ones():
    assert get_mixture("bridge") == {"bridge_orig": 1}
    assert get_mixture("bridge", "octo") == {"bridge_dataset": 1}
    assert get_mixture("rt_1") == get_mixture("rt_1", "octo") == {"fractal20220817_data": 1}
    named = {("openvla", n) for n in MIXTURES["openvla"]} | {("octo", n) for n in MIXTURES["octo"]}
    small = {("openvla", "bridge"), ("openvla", "rt_1"), ("octo", "bridge"), ("octo", "rt_1")}
    assert named == small | set(COLUMNS)


def test_any_dataset_is_a_mixture():
    for name in SPECS:
        assert get_mixture(name) == {name: 1.0}


def test_the_others_mixtures_are_found_by_their_names():
    assert get_mixture("oxe_flex_act_soup")["rh20t"] == 0.5
    assert get_mixture("bridge_rt_1", "octo")["bridge_orig"] == 1


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(KeyError, match=r"no mixture 'oxe_magic_sop'; did you mean 'oxe_magic_soup"):
        get_mixture("oxe_magic_sop")
    with pytest.raises(KeyError, match=r"did you mean 'taco_play'\?"):
        get_mixture("tacoplay")


def test_other_actions_are_left_out_and_named(caplog):
    mixture = get_mixture("rtx_franka", action="eef_pos")
    assert set(get_mixture("rtx_franka")) - set(mixture) == {f"berkeley_rpt{X}"}
    assert f"berkeley_rpt{X}" in caplog.text
    with pytest.raises(KeyError, match="no dataset of the mixture 'roboset' has actions 'eef_pos'"):
        get_mixture("roboset", action="eef_pos")


def test_the_quirks_are_off_by_default():
    defaults = base.get_config()
    assert len(QUIRKS) == 14
    knobs = {path: value for quirk in QUIRKS for path, value in quirk.parity.items()}
    assert len(knobs) == 6
    for path, value in knobs.items():
        assert defaults[path] != value, path


def make(root, name, *versions):
    for version in versions:
        folder = root / name / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}", encoding="utf-8")


def test_the_newest_version_counts(tmp_path, caplog):
    make(tmp_path, "kuka", "0.9.0", "0.10.0", "0.2.0")
    make(tmp_path, "bridge_dataset", "1.0.0")
    make(tmp_path, "bc_z", "0.1.0", "1.0.0")
    (tmp_path / "kuka" / "1.0.0").mkdir()  # without data
    assert find_folder(tmp_path, "kuka") == tmp_path / "kuka" / "0.10.0"
    assert find_folder(tmp_path, "bc_z") == tmp_path / "bc_z" / "0.1.0"
    assert find_folder(tmp_path, "bridge_orig") == tmp_path / "bridge_dataset" / "1.0.0"
    assert find_folder(tmp_path, "toto") is None
    assert not caplog.records
    make(tmp_path / "other", "bc_z", "1.0.0")
    assert find_folder(tmp_path / "other", "bc_z") == tmp_path / "other" / "bc_z" / "1.0.0"
    assert "only version 0.1.0 is sound" in caplog.text


def test_all_missing_datasets_are_told(tmp_path):
    make(tmp_path, "fractal20220817_data", "0.1.0")
    entries = mixture_entries("rt_1", tmp_path)
    folder = str(tmp_path / "fractal20220817_data" / "0.1.0")
    assert entries == ({"spec": "fractal20220817_data", "dir": folder, "weight": 1.0},)
    with pytest.raises(ConfigError, match=r"1 of 2 datasets are not in .*\['bridge_orig'\]"):
        mixture_entries("bridge_rt_1", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'bridge_rt_1'"):
        mixture_entries("bridge_rt1", tmp_path)


def test_octo_leaves_out_what_it_has_no_instructions_for(tmp_path, caplog):
    for name in get_mixture("rtx", "octo"):
        make(tmp_path, name, "0.1.0")
    results = [entry["spec"] for entry in mixture_entries("rtx", tmp_path, "octo")]
    left = ["fractal20220817_data", "bridge_dataset", "taco_play", "jaco_play"]
    assert results == [*left, "berkeley_autolab_ur5"]
    assert "'berkeley_cable_routing', 'kuka', 'nyu_door_opening" in caplog.text
    with pytest.raises(ConfigError, match="take the variant openvla"):
        mixture_entries("viola", tmp_path, "octo")
    make(tmp_path, "bridge_orig", "1.0.0")
    assert len(mixture_entries("rtx", tmp_path)) == 10


def test_config_files(tmp_path):
    make(tmp_path, "bridge_dataset", "1.0.0")
    folder = str(tmp_path / "bridge_dataset" / "1.0.0")
    config = resolve(oxe.get_config(f"bridge:{tmp_path}"))
    (entry,) = config.data.datasets
    assert (entry.spec, entry.dir, entry.weight) == ("bridge_orig", folder, 1.0)
    assert config.data.parity.variant == "openvla"
    assert config.data.clip == 1
    config = resolve(oxe.get_config(f"bridge:{tmp_path}:octo"))
    assert config.data.datasets[0].spec == "bridge_dataset"
    assert config.data.parity.variant == "octo"
    config = resolve(oxe_robovlms.get_config(f"bridge:{tmp_path}"))
    assert (config.data.clip, config.data.parity.stats_split) == (0.65, "all")
    parity = config.data.parity
    assert (parity.gripper, parity.constant_to_zero) == ("exact", True)
    assert (parity.random_goal, parity.left_pad) == (True, False)
    assert config.augment.parity.draws == "shared"
    with pytest.raises(ValueError, match="openvla or octo, not 'okto'"):
        oxe.get_config(f"bridge:{tmp_path}:okto")
