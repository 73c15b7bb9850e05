import numpy as np
import pytest

from eval_servers.calvin.chains import load
from eval_servers.calvin.expert import STEP, TASKS, Expert
from eval_servers.calvin.initial import BLOCKS, initial_state


def play(task, lag=0.5, steps=120, noise=0.0):
    """Tool positions and actions with a tool that goes part of the way to its target a step."""
    robot, scene = initial_state(load().states[0])
    tool, target = robot[:3].copy(), robot[:3].copy()
    expert, places, actions = Expert(task), [], []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        action = expert.act(np.concatenate([tool, robot[3:]]), scene)
        disturbance = rng.normal(0, noise * STEP, 3)
        expert.disturbed(disturbance)
        target = target + action[:3] * STEP + disturbance
        tool = tool + lag * (target - tool)
        places.append(tool)
        actions.append(action)
    return np.array(places), np.array(actions), scene


@pytest.mark.parametrize("task", TASKS)
def test_actions_are_legal(task):
    _, actions, _ = play(task)
    assert np.abs(actions).max() <= 1
    assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}


@pytest.mark.parametrize("color", list(BLOCKS))
def test_the_fingers_close_at_the_block_and_then_rise(color):
    places, actions, scene = play(f"lift_{color}_block_table")
    block = scene[BLOCKS[color]][:3]
    first = int(np.argmax(actions[:, 6] == -1))
    assert 0 < first < 60
    assert (actions[:first, 6] == 1).all()
    assert (actions[first:, 6] == -1).all()
    assert np.linalg.norm(places[first] - block) < 0.015
    assert np.linalg.norm(places[first + 5] - block) < 0.01
    assert places[-1][2] > block[2] + 0.1
    # It comes from above: by the time it is down at the block it is over it.
    low = places[:, 2] < block[2] + 0.04
    assert np.abs(places[low][:, :2] - block[:2]).max() < 0.02


@pytest.mark.parametrize("task", TASKS)
def test_disturbed_motion_is_corrected(task):
    places, actions, scene = play(task, noise=0.2)
    if task.startswith("lift"):
        block = scene[BLOCKS[task.split("_")[1]]][:3]
        first = int(np.argmax(actions[:, 6] == -1))
        assert 0 < first < 60
        assert np.linalg.norm(places[first : first + 8] - block, axis=1).max() < 0.025
        assert places[-1][2] > block[2] + 0.1
    else:
        assert places[:, 2].min() < 0.46
        assert places[-1][2] > 0.5


def test_a_tool_that_is_held_up_does_not_stop_the_script():
    _, actions, _ = play("turn_on_led", lag=0.0)
    assert actions[-1, 2] == 0
    assert (np.diff(np.sign(actions[:, 2])) != 0).any()


def test_tasks_without_a_script_are_refused():
    with pytest.raises(ValueError, match="stack_block"):
        Expert("stack_block")
