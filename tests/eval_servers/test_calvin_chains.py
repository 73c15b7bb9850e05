import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval_servers import rollout
from eval_servers.calvin import chains
from eval_servers.calvin.initial import (
    BLOCKS,
    CLEARANCE,
    SURFACES,
    State,
    fnv0_utf16,
    initial_state,
    redrawn_state,
    seed_of,
)

GOLDEN = Path(__file__).with_name("calvin_golden")
# Of RoboVLMs' configs/data/calvin/eval_sequences.json, which is json.dump(..., indent=4).
EVAL_SEQUENCES = "c99e041c255df3408ebf3bbb4feea8b407e17e60e7c07d172a6ea7ba6680e8ca"


@pytest.fixture(scope="module")
def protocol():
    return chains.load()


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(GOLDEN / "initial_states.npz")
    states = [State(**json.loads(text)) for text in arrays["condition"]]
    return states, arrays["robot_obs"], arrays["scene_obs"], arrays["hash"]


def test_the_chains_are_the_published_list_to_the_byte(protocol):
    sequences = [[state._asdict(), list(tasks)] for state, tasks in protocol.chains]
    text = json.dumps(sequences, indent=4)
    assert hashlib.sha256(text.encode()).hexdigest() == EVAL_SEQUENCES
    assert len(protocol.chains) == 1000


def test_instructions_are_the_validation_annotations_in_calvins_order(protocol):
    annotations = yaml.safe_load((GOLDEN / "new_playtable_validation.yaml").read_text())
    tasks = yaml.safe_load((GOLDEN / "new_playtable_tasks.yaml").read_text())["tasks"]
    assert {task: [text] for task, text in protocol.instructions.items()} == annotations
    assert list(protocol.instructions) == list(tasks)


def test_every_seed_is_pyhashs(golden):
    pairs = json.loads((GOLDEN / "pyhash.json").read_text())
    assert len(pairs) == 192
    assert [seed_of(State(*values)) for values, _ in pairs] == [seed for _, seed in pairs]
    states, _, _, hashes = golden
    assert [seed_of(state) for state in states] == hashes.tolist()


def test_fnv0_starts_from_zero_and_takes_two_bytes_a_letter():
    assert fnv0_utf16("") == 0
    assert fnv0_utf16("a") == 0x61 * 0x01000193 & 0xFFFFFFFF
    assert fnv0_utf16("\u0100") == 0x01  # bytes 00 01


def test_every_initial_state_is_calvins_to_the_bit(protocol, golden):
    states, robots, scenes, _ = golden
    assert list(protocol.states) == states
    for state, robot, scene in zip(states, robots, scenes, strict=True):
        ours = initial_state(state)
        assert ours[0].tobytes() == robot.tobytes(), state
        assert ours[1].tobytes() == scene.tobytes(), state


def test_a_block_nowhere_is_refused(protocol):
    with pytest.raises(ValueError, match=r"red.*shelf"):
        initial_state(protocol.states[0]._replace(red_block="shelf"))


def test_every_chains_first_task_is_possible_from_its_start(protocol):
    assert all(chains.possible(tasks[0], state) for state, tasks in protocol.chains)


@pytest.mark.parametrize(
    ("task", "state", "expected"),
    [
        ("lift_red_block_table", {"red_block": "table"}, True),
        ("lift_red_block_slider", {"red_block": "table"}, False),
        ("lift_blue_block_slider", {"blue_block": "slider_left"}, True),
        ("push_blue_block_left", {"blue_block": "slider_left"}, False),
        ("turn_on_led", {"led": 1}, False),
        ("turn_off_lightbulb", {"lightbulb": 1, "led": 0}, True),
        ("move_slider_left", {"slider": "left"}, False),
        ("close_drawer", {"drawer": "closed"}, False),
        ("push_into_drawer", {"drawer": "closed"}, False),
        ("stack_block", {}, False),
    ],
)
def test_what_is_possible(protocol, task, state, expected):
    assert chains.possible(task, protocol.states[0]._replace(**state)) is expected


def test_episodes_of_chains(protocol):
    shard = chains.episodes_of_chains(protocol, 3, 7)
    assert [episode.index for episode in shard] == [3, 4, 5, 6]
    for episode in shard:
        state, tasks = protocol.chains[episode.index]
        assert (episode.state, episode.tasks) == (state, tasks)
        assert episode.seed == seed_of(state)
        assert episode.instructions == tuple(protocol.instructions[task] for task in tasks)
    for first, last in ((0, 1001), (5, 5), (-1, 4)):
        with pytest.raises(ValueError, match="0:1000"):
            chains.episodes_of_chains(protocol, first, last)


def test_episodes_of_tasks_take_turns_and_starts_that_allow_them(protocol):
    tasks = ["lift_red_block_table", "turn_off_led"]
    episodes = chains.episodes_of_tasks(protocol, tasks, 40)
    assert [episode.task for episode in episodes] == tasks * 20
    assert all(chains.possible(e.task, e.state) and e.tasks == (e.task,) for e in episodes)
    assert len({episode.state for episode in episodes if episode.task == tasks[0]}) == 20
    with pytest.raises(ValueError, match="no task"):
        chains.episodes_of_tasks(protocol, ["fly"], 1)
    with pytest.raises(ValueError, match="unstack_block"):
        chains.episodes_of_tasks(protocol, ["unstack_block"], 1)


def test_swapped_instructions_are_other_tasks_ones(protocol):
    instructions = rollout.other_instructions(list(protocol.instructions))
    for episode in chains.episodes_of_chains(protocol, 0, 50, swap_instructions=True):
        for task, instruction in zip(episode.tasks, episode.instructions, strict=True):
            assert instruction == protocol.instructions[instructions[task]]
            assert instruction != protocol.instructions[task]


def test_redrawn_blocks_lie_anywhere_on_their_own_surface(protocol):
    episodes = chains.episodes_of_chains(protocol, 0, 200)
    redrawn = chains.redraw(episodes, "D", 1)
    assert [x.tasks for x in redrawn] == [x.tasks for x in episodes]
    on_table = []
    for official, chain in zip(episodes, redrawn, strict=True):
        robot, scene = chains.start_of(chain)
        expected_robot, expected = chains.start_of(official)
        np.testing.assert_array_equal(robot, expected_robot)
        # Slider, drawer and lamps are as the chain says.
        np.testing.assert_array_equal(scene[:6], expected[:6])
        poses = np.array([scene[fields] for fields in BLOCKS.values()])
        for pose, place in zip(poses, chain.state.places.values(), strict=True):
            low, high = SURFACES["D"][place]
            np.testing.assert_array_equal(pose[:2], np.clip(pose[:2], low, high))
            assert pose[2] == 0.46
            on_table += [pose[0]] if place == "table" else []
        apart = [np.linalg.norm(poses[i, :2] - poses[j, :2]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert min(apart) >= CLEARANCE
    # The official rule has two places on the table; here they cover its whole length.
    assert np.histogram(on_table, bins=7, range=(0.0, 0.35))[0].min() > 10


def test_a_draw_is_the_seeds_and_the_episodes(protocol):
    episodes = chains.episodes_of_tasks(protocol, ["lift_red_block_table"], 4)

    def scenes(seed: int) -> list[np.ndarray]:
        return [chains.start_of(x)[1] for x in chains.redraw(episodes, "D", seed)]

    np.testing.assert_array_equal(scenes(1), scenes(1))
    distinct = {x.tobytes() for seed in (1, 2) for x in scenes(seed)}
    assert len(distinct) == 8
    # Scenes differ in where their surfaces are.
    state = protocol.states[0]
    assert (redrawn_state(state, 1, "A")[1] != redrawn_state(state, 1, "B")[1]).any()
