import numpy as np
import pytest

from eval_servers.tabletop import layout, tasks
from eval_servers.tabletop.expert import Expert, demonstrations
from eval_servers.tabletop.world import World
from tests.eval_servers.solved import solved_tasks, startable


def fresh(task, seed):
    return World(tasks.initial_conditions(task, np.random.RandomState(seed)))


def attempt(world, task, noise=0.0, rng=None):
    """(steps until the task is solved or None, every task that any oracle reported on the way)."""
    expert, start, recorded = Expert(task), world.get_info(), set()
    for step in range(1, tasks.HORIZON + 1):
        action = expert.act(world)
        if rng is not None:
            action[[0, 1, 2, 5]] += noise * rng.normal(size=4)
        world.step(action)
        solved = solved_tasks(start, world.get_info())
        recorded.update(solved)
        if task in solved:
            return step, recorded
    return None, recorded


def test_instructions_tell_the_tasks_apart():
    phrases = [phrase for task in tasks.TASKS for phrase in tasks.annotations(task)]
    assert len(tasks.TASKS) == 13
    assert len(set(phrases)) == len(phrases) == 4 * len(tasks.TASKS)
    assert tasks.instruction("place_red_left") == "put the red block on the left pad"
    assert tasks.annotations("turn_on_led")[0] == tasks.instruction("turn_on_led")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_nothing_is_solved_at_the_start(task):
    for seed in range(50):
        info = fresh(task, seed).get_info()
        assert solved_tasks(info, info) == []
        assert startable(task, info)
        spots = np.array([b["pos"][:2] for b in info["scene_info"]["blocks"].values()])
        gaps = np.linalg.norm(spots[:, None] - spots[None], axis=-1)[np.triu_indices(3, 1)]
        assert gaps.min() >= layout.SPAWN_GAP


@pytest.mark.parametrize("task", tasks.TASKS)
def test_expert_solves_its_task_and_only_that(task):
    lengths = []
    for seed in range(20):
        steps, observed = attempt(fresh(task, seed), task)
        assert observed <= {task}
        lengths.append(steps)
    done = [n for n in lengths if n is not None]
    assert len(done) >= 19
    assert np.mean(done) <= 25


@pytest.mark.parametrize("task", tasks.TASKS)
def test_expert_recovers_from_a_shaking_hand(task):
    solved = 0
    for seed in range(10):
        rng = np.random.RandomState(seed)
        steps, _ = attempt(fresh(task, seed), task, noise=0.5, rng=rng)
        solved += steps is not None
    assert solved >= 8


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_expert_over_many_seeds(task):
    for noise in (0.0, 0.25):
        results = [
            attempt(fresh(task, seed), task, noise, np.random.RandomState(seed))
            for seed in range(1000, 1300)
        ]
        assert np.mean([steps is not None for steps, _ in results]) >= 0.99
        assert all(observed <= {task} for _, observed in results)


def test_expert_goes_on_from_where_the_last_task_ended():
    """CALVIN's chains: no reset between tasks, so things are held, placed and stacked already."""
    solved = 0
    for seed in range(20):
        rng = np.random.RandomState(seed)
        world = fresh(None, seed)
        for _ in range(5):
            options = [t for t in tasks.TASKS if startable(t, world.get_info())]
            steps, _ = attempt(world, options[rng.randint(len(options))])
            solved += steps is not None
    assert solved >= 98


def test_another_tasks_expert_does_not_solve_this_task():
    for task in tasks.TASKS:
        for other in tasks.TASKS:
            if other == task or not startable(other, fresh(task, 3).get_info()):
                continue
            _, observed = attempt(fresh(task, 3), other)
            assert task not in observed, (task, other)


def test_an_idle_hand_solves_nothing():
    world = fresh("turn_on_led", 0)
    start = world.get_info()
    for _ in range(tasks.HORIZON):
        world.step([0, 0, 0, 0, 0, 0, 1])
    assert solved_tasks(start, world.get_info()) == []


def test_a_block_pushed_onto_the_pad_is_not_placed():
    world = fresh(None, 0)
    start, current = world.get_info(), world.get_info()
    block = current["scene_info"]["blocks"]["red"]
    block["pos"][:2] = layout.PADS["left"]
    assert not tasks.solved("place_red_left", start, current)
    block["grasps"] += 1
    assert tasks.solved("place_red_left", start, current)
    assert not tasks.solved("place_red_right", start, current)
    block["held"] = True
    assert not tasks.solved("place_red_left", start, current)


def test_a_block_low_in_the_hand_is_not_lifted():
    world = fresh(None, 0)
    start, current = world.get_info(), world.get_info()
    block = current["scene_info"]["blocks"]["red"]
    block["held"], block["pos"][2] = True, tasks.LIFT_HEIGHT - 0.01
    assert not tasks.solved("lift_red_block", start, current)
    block["pos"][2] = tasks.LIFT_HEIGHT + 0.01
    assert solved_tasks(start, current) == ["lift_red_block"]
    assert not tasks.solved("lift_red_block", current, current)


def test_unknown_tasks_are_refused():
    info = fresh(None, 0).get_info()
    for call in (
        lambda: tasks.instruction("fly"),
        lambda: tasks.solved("fly", info, info),
        lambda: tasks.initial_conditions("fly", np.random.RandomState(0)),
        lambda: Expert("fly"),
        lambda: next(demonstrations([0], ["fly"])),
    ):
        with pytest.raises(ValueError, match="no task 'fly'"):
            call()


def test_demonstrations_are_episodes_of_clean_labels():
    wanted = ["lift_red_block", "move_slider_left", "turn_off_led"]
    episodes = list(demonstrations(range(6), wanted, image_size=32))
    assert [e["episode_metadata"]["task"] for e in episodes] == wanted * 2
    assert [e["episode_metadata"]["seed"] for e in episodes] == list(range(6))
    for episode in episodes:
        steps, count = episode["steps"], len(episode["steps"]["action"])
        assert all(len(column) == count for column in steps.values())
        assert steps["observation/rgb_static"].shape == (count, 32, 32, 3)
        assert steps["observation/rgb_static"].dtype == np.uint8
        assert steps["observation/robot_obs"].shape == (count, 15)
        assert steps["action"].dtype == np.float32
        assert np.abs(steps["action"]).max() <= 1
        assert set(np.unique(steps["action"][:, 6])) <= {-1.0, 1.0}
        assert not steps["action"][:, 3:5].any()
        assert len(set(steps["language_instruction"])) == 1
        phrase = str(steps["language_instruction"][0])
        assert phrase in tasks.annotations(episode["episode_metadata"]["task"])
        assert steps["is_first"].tolist() == [True] + [False] * (count - 1)
        assert steps["is_last"].tolist() == [False] * (count - 1) + [True]
        assert steps["reward"].sum() == steps["reward"][-1] == 1


def test_noise_moves_the_hand_but_not_the_label():
    (clean,), (noisy,) = (
        list(demonstrations([3], ["lift_red_block"], noise=n, image_size=16)) for n in (0.0, 0.25)
    )
    tool = [e["steps"]["observation/robot_obs"][:, :3] for e in (clean, noisy)]
    np.testing.assert_array_equal(tool[0][0], tool[1][0])
    np.testing.assert_array_equal(clean["steps"]["action"][0], noisy["steps"]["action"][0])
    moved = np.diff(tool[0], axis=0)[:3] / layout.ACTION_SCALE
    np.testing.assert_allclose(moved, clean["steps"]["action"][:3, :3], atol=1e-4)
    shaken = np.diff(tool[1], axis=0)[:3] / layout.ACTION_SCALE
    assert np.abs(shaken - noisy["steps"]["action"][:3, :3]).max() > 0.05


def test_demonstrations_do_not_depend_on_the_split():
    full = list(demonstrations([4, 5], ["turn_on_led"], image_size=16))
    parts = [e for s in ([4], [5]) for e in demonstrations(s, ["turn_on_led"], image_size=16)]
    for a, b in zip(full, parts, strict=True):
        assert a["episode_metadata"] == b["episode_metadata"]
        for key, column in a["steps"].items():
            np.testing.assert_array_equal(column, b["steps"][key])
