import copy
import math
from pathlib import Path

import pytest
import yaml

from eval_servers.calvin import oracle
from tests.eval_servers.solved import achieved

GOLDEN = Path(__file__).with_name("calvin_golden")
ROBOT, RED, BLUE, PINK, TABLE, FLOOR = range(6)
LINKS = {"base_link": -1, "plank_link": 5, "drawer_link": 3}
ARGUMENTS = {  # CALVIN's task function -> its arguments in CALVIN's table, as ours
    "rotate_object": lambda block, degrees: (block[6:], degrees),
    "push_object": lambda block, x, y: (block[6:], x),
    "lift_object": lambda block, z, body, link: (block[6:], z, link),
    "place_object": lambda body, link: (link,),
    "push_object_into": lambda blocks, b, source, c, target: (source, target),
    "move_door_rel": lambda joint, threshold: (joint, threshold),
    "toggle_light": lambda lamp, before, after: (lamp, before, after),
    "stack_objects": tuple,
    "unstack_objects": tuple,
}


def contact(body, link=-1):
    return (0, 0, body, 0, link, (0, 0, 0))


def turned(axis, degrees):
    half = math.radians(degrees) / 2
    quaternion = [0.0, 0.0, 0.0, math.cos(half)]
    quaternion["xyz".index(axis)] = math.sin(half)
    return quaternion


def make_info():
    """Three blocks on the table, lamps off, the hand free."""
    blocks = {
        name: {
            "current_pos": (0.1 * uid, -0.1, 0.46),
            "current_orn": (0.0, 0.0, 0.0, 1.0),
            "current_lin_vel": (0.0, 0.0, 0.0),
            "current_ang_vel": (0.0, 0.0, 0.0),
            "contacts": [contact(TABLE)],
            "uid": uid,
        }
        for name, uid in (("block_red", RED), ("block_blue", BLUE), ("block_pink", PINK))
    }
    return {
        "robot_info": {"uid": ROBOT, "contacts": []},
        "scene_info": {
            "fixed_objects": {"table": {"uid": TABLE, "links": LINKS, "contacts": []}},
            "movable_objects": blocks,
            "doors": {n: {"current_state": 0.1} for n in ("base__slide", "base__drawer")},
            "lights": {name: {"logical_state": 0} for name in ("lightbulb", "led")},
        },
    }


def block(info, name="red"):
    return info["scene_info"]["movable_objects"]["block_" + name]


@pytest.fixture
def start():
    return make_info()


@pytest.fixture
def end():
    return make_info()


def test_the_table_is_calvins():
    table = yaml.safe_load((GOLDEN / "new_playtable_tasks.yaml").read_text())["tasks"]
    assert list(oracle.TASKS) == list(table)
    functions = {}
    for task, (function, *arguments) in table.items():
        ours, our_arguments = oracle.TASKS[task]
        assert our_arguments == tuple(ARGUMENTS[function](*arguments)), task
        functions.setdefault(function, set()).add(ours)
    assert all(len(ours) == 1 for ours in functions.values())


def test_nothing_happened(start, end):
    assert achieved(start, end) == set()
    with pytest.raises(KeyError):
        oracle.solved("fly", start, end)


@pytest.mark.parametrize(
    ("orn", "pos", "touched", "solved"),
    [
        (turned("z", -61), 0.0, True, {"rotate_red_block_right"}),
        (turned("z", 61), 0.0, True, {"rotate_red_block_left"}),
        (turned("z", 59), 0.0, True, set()),
        (turned("z", 61), 0.11, True, {"push_red_block_right"}),  # too far to count as turned
        (turned("x", 61), 0.0, True, set()),
        (turned("z", 61), 0.0, False, set()),  # in the air
    ],
)
def test_rotate(start, end, orn, pos, touched, solved):
    block(end)["current_orn"] = orn
    block(end)["current_pos"] = (0.1 * RED + pos, -0.1, 0.46)
    block(end)["contacts"] = [contact(TABLE), contact(ROBOT)] if touched else [contact(ROBOT)]
    assert achieved(start, end) == solved


def test_rotation_is_relative_to_the_start_and_about_fixed_axes(start, end):
    block(start)["current_orn"] = turned("z", 150)
    block(end)["current_orn"] = turned("z", -149)  # 61 degrees on, across the seam
    assert achieved(start, end) == {"rotate_red_block_left"}


def test_push(start, end):
    block(end)["current_pos"] = (0.1 * RED - 0.11, -0.1, 0.46)
    assert achieved(start, end) == {"push_red_block_left"}
    block(end)["contacts"] = [contact(TABLE, LINKS["plank_link"])]  # another surface
    assert achieved(start, end) == set()
    block(end)["contacts"] = [contact(TABLE), contact(BLUE), contact(ROBOT)]
    assert achieved(start, end) == {"push_red_block_left"}


@pytest.mark.parametrize(
    ("link", "height", "task"),
    [
        ("base_link", 0.051, "lift_red_block_table"),
        ("plank_link", 0.031, "lift_red_block_slider"),
        ("drawer_link", 0.051, "lift_red_block_drawer"),
    ],
)
def test_lift(start, end, link, height, task):
    block(start)["contacts"] = [contact(TABLE, LINKS[link])]
    block(end)["contacts"] = [contact(ROBOT, 9), contact(ROBOT, 11)]
    block(end)["current_pos"] = (0.1 * RED, -0.1, 0.46 + height)
    assert achieved(start, end) == {task}
    block(end)["contacts"].append(contact(BLUE))
    assert achieved(start, end) == set()
    block(end)["contacts"] = [contact(ROBOT)]
    block(end)["current_pos"] = (0.1 * RED, -0.1, 0.46 + height - 0.002)
    assert achieved(start, end) == set()


@pytest.mark.parametrize(
    ("link", "task"), [("plank_link", "place_in_slider"), ("drawer_link", "place_in_drawer")]
)
def test_place(start, end, link, task):
    start["robot_info"]["contacts"] = [contact(RED), contact(RED)]
    block(start)["contacts"] = [contact(ROBOT)]
    block(end)["contacts"] = [contact(TABLE, LINKS[link])]
    assert achieved(start, end) == {task}
    end["robot_info"]["contacts"] = [contact(RED)]  # not let go
    assert achieved(start, end) == set()
    end["robot_info"]["contacts"] = []
    block(start)["contacts"].append(contact(TABLE))  # was not lifted
    assert achieved(start, end) == set()


def test_push_into_drawer(start, end):
    block(end, "pink")["contacts"] = [contact(TABLE, LINKS["drawer_link"]), contact(ROBOT)]
    assert achieved(start, end) == {"push_into_drawer"}
    block(start, "pink")["contacts"].append(contact(ROBOT))
    assert achieved(start, end) == set()


@pytest.mark.parametrize(
    ("joint", "state", "task"),
    [
        ("base__slide", 0.251, "move_slider_left"),
        ("base__slide", -0.051, "move_slider_right"),
        ("base__drawer", 0.221, "open_drawer"),
        ("base__drawer", -0.021, "close_drawer"),
    ],
)
def test_doors(start, end, joint, state, task):
    end["scene_info"]["doors"][joint]["current_state"] = state
    assert achieved(start, end) == {task}
    end["scene_info"]["doors"][joint]["current_state"] = state - math.copysign(0.002, state - 0.1)
    assert achieved(start, end) == set()


@pytest.mark.parametrize("lamp", ["lightbulb", "led"])
def test_lamps(start, end, lamp):
    end["scene_info"]["lights"][lamp]["logical_state"] = 1
    assert achieved(start, end) == {"turn_on_" + lamp}
    assert achieved(end, start) == {"turn_off_" + lamp}
    assert achieved(end, copy.deepcopy(end)) == set()


def test_stack_and_unstack(start, end):
    block(end)["contacts"] = [contact(BLUE)]
    block(end, "blue")["contacts"] = [contact(RED), contact(TABLE)]
    assert achieved(start, end) == {"stack_block"}
    assert achieved(end, start) == {"unstack_block"}
    block(end)["current_ang_vel"] = (0.0, -1.5, 0.0)  # still falling
    assert achieved(start, end) == achieved(end, start) == set()
    block(end)["current_ang_vel"] = (0.0, 0.0, 0.0)
    block(end)["contacts"].append(contact(ROBOT))
    assert achieved(start, end) == set()
