"""The table of tasks, settings, worlds and starts, against numbers of the published evaluation."""

import json
from dataclasses import asdict

import pytest

from eval_servers.simpler.tasks import ENVIRONMENTS, TASKS
from eval_servers.simpler.trials import instruction, trials
from eval_servers.simpler.worlds import SETTINGS, Start, settings_of, starts, worlds

APPLE = "google_robot_place_apple_in_closed_top_drawer"
# Episodes of a task in a setting, as the published scripts loop over them.
COUNTS = {
    ("google_robot_pick_coke_can", "visual_matching"): 4 * 3 * 25,
    ("google_robot_pick_coke_can", "variant_aggregation"): 9 * 3 * 25,
    ("google_robot_pick_coke_can", "camera_variants"): 2 * 3 * 25,
    ("google_robot_move_near", "visual_matching"): 4 * 60,
    ("google_robot_move_near", "variant_aggregation"): 8 * 60,
    ("google_robot_move_near", "camera_variants"): 2 * 60,
    ("google_robot_open_drawer", "visual_matching"): 4 * 9 * 3,
    ("google_robot_close_drawer", "visual_matching"): 4 * 9 * 3,
    ("google_robot_open_drawer", "variant_aggregation"): 7 * 9 * 3,
    ("google_robot_close_drawer", "variant_aggregation"): 7 * 9 * 3,
    (APPLE, "visual_matching"): 4 * 3 * 9,
    (APPLE, "variant_aggregation"): 7 * 3 * 9,
    ("widowx_spoon_on_towel", "visual_matching"): 24,
    ("widowx_carrot_on_plate", "visual_matching"): 24,
    ("widowx_stack_cube", "visual_matching"): 24,
    ("widowx_put_eggplant_in_basket", "visual_matching"): 24,
}


def test_simplerenvs_25_names():
    assert len(ENVIRONMENTS) == 25
    assert all("prepackaged" in settings_of(name) for name in ENVIRONMENTS)
    assert {part for parts in TASKS.values() for part in parts} <= set(ENVIRONMENTS)
    steps = {name: environment.steps for name, environment in ENVIRONMENTS.items()}
    assert steps["widowx_stack_cube"] == 60
    assert steps["widowx_put_eggplant_in_basket"] == 120
    assert {steps[n] for n in steps if "pick" in n or "near" in n} == {80}
    assert {steps[n] for n in steps if "_open_" in n or "_close_" in n} == {113}
    assert {steps[n] for n in steps if "_place_" in n} == {200}
    gyms = {name: environment.gym for name, environment in ENVIRONMENTS.items()}
    assert gyms["google_robot_open_drawer"] == "OpenDrawerCustomInScene-v0"
    assert gyms["google_robot_close_middle_drawer"] == "CloseMiddleDrawerCustomInScene-v0"
    place = "google_robot_place_in_closed_bottom_drawer"
    assert gyms[place] == "PlaceIntoClosedBottomDrawerCustomInScene-v0"


def test_episodes_of_the_published_evaluation():
    results = {
        (task, setting): len(trials([task], setting))
        for task, parts in TASKS.items()
        for setting in settings_of(parts[0])
        if setting != "prepackaged"
    }
    assert results == COUNTS


def test_no_episode_twice():
    for task, setting in COUNTS:
        result = trials([task], setting)
        assert len({(t.task, t.variant, t.start) for t in result}) == len(result)
        assert [t.index for t in result] == list(range(len(result)))
        distinct = {worlds(t.task, setting)[t.variant] for t in result}
        assert len(distinct) == len({(t.task, t.variant) for t in result})


def test_every_variant_of_a_task_has_as_many_starts():
    # So that the mean over episodes is the published mean of means.
    for task, setting in COUNTS:
        for part in TASKS[task]:
            counts = {len(starts(part, setting, variant)) for variant in worlds(part, setting)}
            assert len(counts) == 1


def test_grids_by_hand():
    can = starts("google_robot_pick_standing_coke_can", "visual_matching", "None")
    assert can[0] == Start((0.35, 0.2, 0.0), (-0.35, -0.02))
    assert can[1].place == pytest.approx((-0.35, 0.09))
    assert can[-1].place == pytest.approx((-0.12, 0.42))
    drawer = starts("google_robot_open_top_drawer", "visual_matching", "None a2")
    assert drawer == [Start((0.889, -0.203, -0.06), (0.0, 0.0))]
    room = starts("google_robot_open_top_drawer", "variant_aggregation", "base")
    assert [start.robot for start in room[:4]] == [
        (0.65, -0.2, 0), (0.65, 0.0, 0), (0.65, 0.2, 0), (0.75, -0.2, 0)
    ]  # fmt: skip
    apple = starts(APPLE, "variant_aggregation", "base")
    assert apple[4].robot == (0.65, -0.2, 0.0)
    assert apple[4].place == pytest.approx((-0.05, 0.03))
    sink = starts("widowx_put_eggplant_in_basket", "visual_matching", "base")
    assert sink[23] == Start((0.127, 0.06, 0.0), episode=23)


def test_worlds_by_hand():
    result = worlds("google_robot_close_top_drawer", "visual_matching")
    world = result["recolor_cabinet_visual_matching_1 b1"]
    assert (world.scene, world.overlay, world.traced) == (
        "dummy_drawer", "open_drawer_b1.png", True
    )  # fmt: skip
    assert dict(world.options) == {
        "station_name": "mk_station_recolor",
        "light_mode": "simple",
        "disable_bad_material": True,
        "urdf_version": "recolor_cabinet_visual_matching_1",
    }
    apple = worlds(APPLE, "visual_matching")
    assert {name.split()[1] for name in apple} == {"a0", "b0", "c0"}
    assert dict(apple["None a0"].options)["model_ids"] == "baked_apple_v2"
    room = worlds(APPLE, "variant_aggregation")
    assert dict(room["light darker"].options) == {"model_ids": "apple", "light_mode": "darker"}
    assert room["background 2"].scene == "modern_office_no_roof"
    can = worlds("google_robot_pick_vertical_coke_can", "variant_aggregation")
    assert list(can) == [
        "base", "background 1", "background 2", "table 1", "table 2", "light darker",
        "light brighter", "distractors less", "distractors more",
    ]  # fmt: skip
    assert dict(can["light darker"].options) == {
        "laid_vertically": True, "slightly_darker_lighting": True
    }  # fmt: skip
    assert not any(world.overlay for world in can.values())
    near = worlds("google_robot_move_near", "visual_matching")
    assert near["None"].gym == "MoveNearGoogleBakedTexInScene-v0"
    assert worlds("google_robot_move_near", "prepackaged")["prepackaged"].gym.endswith("v1")
    turned = worlds("google_robot_move_near", "camera_variants")
    assert [world.gym for world in turned.values()] == [
        "MoveNearAltGoogleCameraInScene-v0", "MoveNearAltGoogleCamera2InScene-v0"
    ]  # fmt: skip


def test_instructions():
    assert [t.instruction for t in trials(["google_robot_move_near"], "visual_matching")[:7]] == [
        "move blue plastic bottle near pepsi can",
        "move blue plastic bottle near orange",
        "move pepsi can near blue plastic bottle",
        "move pepsi can near orange",
        "move orange near blue plastic bottle",
        "move orange near pepsi can",
        "move blue plastic bottle near pepsi can",
    ]
    assert instruction("google_robot_move_near", Start(episode=59)) == (
        "move redbull can near pepsi can"
    )
    assert instruction("google_robot_open_middle_drawer", Start()) == "open middle drawer"
    assert instruction(APPLE, Start()) == "open top drawer"
    assert instruction("google_robot_open_drawer", Start(seed=3)) == ""  # its own choice


def test_a_subset_is_spread_over_variants():
    result = trials(["google_robot_pick_coke_can"], "visual_matching", 4)
    assert len(result) == 12
    assert len({t.variant for t in result}) == 4
    assert len(trials(["widowx_stack_cube"], "visual_matching", 100)) == 24


def test_swapped_instructions():
    tasks = ["widowx_stack_cube", "widowx_carrot_on_plate"]
    result = trials(tasks, "visual_matching", 1, swap=True)
    assert [t.instruction for t in result] == [
        "put carrot on plate", "stack the green block on the yellow block"
    ]  # fmt: skip
    assert all(t.swapped for t in result)
    with pytest.raises(ValueError, match="at least two tasks"):
        trials(tasks[:1], "visual_matching", 1, swap=True)


@pytest.mark.parametrize(
    ("names", "setting", "words"),
    [
        (["widowx_fly"], "visual_matching", "no task widowx_fly.*widowx_stack_cube"),
        (["widowx_stack_cube"], "real", "no setting real.*variant_aggregation"),
        (["widowx_stack_cube"], "variant_aggregation", "no setting of widowx_stack_cube"),
        (["google_robot_pick_object"], "visual_matching", "no setting of google_robot_pick"),
        (["widowx_stack_cube", "google_robot_move_near"], "visual_matching", "one robot"),
    ],
)
def test_what_does_not_go_together(names, setting, words):
    with pytest.raises(ValueError, match=words):
        trials(names, setting)


def test_a_world_of_another_setting_is_refused():
    with pytest.raises(ValueError, match="it has visual_matching, prepackaged"):
        worlds("widowx_stack_cube", "camera_variants")


def test_trials_become_rows():
    for setting in SETTINGS:
        row = json.loads(json.dumps(asdict(trials(["google_robot_move_near"], setting, 1)[0])))
        assert row["setting"] == setting
        assert row["start"][2] == 0
