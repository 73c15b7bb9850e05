import numpy as np
import pytest

from eval_servers.tabletop import contact, layout, tasks
from eval_servers.tabletop.expert import Expert
from eval_servers.tabletop.world import World

FAR = {"red": (0.0, 0.0, 0.0), "green": (0.2, 0.0, 0.0), "blue": (-0.2, 0.0, 0.0)}


def world(tool=(0.0, 0.0, 0.02), slider=0.0, led=False, **blocks):
    return World({"blocks": {**FAR, **blocks}, "tool": tool, "slider": slider, "led": led})


def move(w, x=0.0, y=0.0, z=0.0, yaw=0.0, grip=1, times=1):
    """Steps of (x, y, z) metres and yaw radians."""
    delta = np.array([x, y, z]) / layout.ACTION_SCALE
    for _ in range(times):
        w.step([*delta, 0.0, 0.0, yaw / layout.YAW_SCALE, grip])


def red(w):
    return w.get_info()["scene_info"]["blocks"]["red"]


def test_actions_are_relative_metres_and_radians_and_clipped():
    w = world(tool=(0.0, -0.1, 0.15))
    w.step([0.5, -1.0, 5.0, 1.0, 1.0, -1.0, 1])
    robot = w.get_info()["robot_info"]
    np.testing.assert_allclose(robot["tcp_pos"], [0.02, -0.14, 0.19])
    np.testing.assert_allclose(robot["tcp_orn"], [0.0, 0.0, -0.1])  # roll and pitch ignored


def test_tool_stays_in_its_workspace():
    w = world(tool=(0.0, 0.0, 0.2))
    move(w, 0.04, 0.04, 0.04, times=20)
    assert w.get_info()["robot_info"]["tcp_pos"] == list(layout.TOOL_HIGH)
    move(w, -0.04, -0.04, times=20)
    move(w, z=-0.04, times=20)
    np.testing.assert_allclose(w.get_info()["robot_info"]["tcp_pos"], layout.TOOL_LOW)


def test_gripper_closes_in_two_steps_on_nothing():
    w = world(tool=(0.0, 0.1, 0.2))
    widths = []
    for grip in (-1, -1, -1, 1, 1, 1):
        move(w, grip=grip)
        widths.append(w.get_info()["robot_info"]["gripper_opening_width"])
    assert widths == pytest.approx([0.06, 0, 0, 0.06, 0.12, 0.12])
    assert w.get_info()["robot_info"]["held"] is None


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.024, 0.0), (-0.024, 0.0), (0.0, 0.024)])
def test_grasp_tolerates_forty_percent_of_the_width(offset):
    w = world(red=(*offset, 0.1))
    move(w, grip=-1)
    assert w.get_info()["robot_info"]["held"] == "red_block"
    assert red(w)["grasps"] == 1
    assert red(w)["pos"][0] == pytest.approx(0.0)  # the jaws centre it
    assert red(w)["yaw"] == pytest.approx(0.0)  # and square it up


@pytest.mark.parametrize("spot", [(0.11, 0.0), (0.0, 0.035), (0.0, -0.05)])
def test_fingers_that_do_not_straddle_do_not_grasp(spot):
    w = world(tool=(0.0, 0.0, 0.02), red=(*spot, 0.0))
    for _ in range(3):
        move(w, grip=-1)
    assert w.get_info()["robot_info"]["held"] is None
    assert red(w)["grasps"] == 0


def test_fingers_above_a_block_do_not_grasp_it():
    w = world(tool=(0.0, 0.0, 0.055))
    move(w, grip=-1, times=2)
    assert w.get_info()["robot_info"]["held"] is None


def test_half_open_fingers_do_not_come_down_around_a_block():
    w = world(tool=(0.0, 0.0, 0.1))
    move(w, grip=-1)
    move(w, z=-0.04, grip=-1, times=4)
    assert w.get_info()["robot_info"]["held"] is None
    assert w.tool[2] == pytest.approx(2 * layout.BLOCK_HALF)  # closed fingers stand on it


def test_held_block_follows_and_turns_and_drops():
    w = world(red=(0.0, 0.01, 0.0))
    move(w, grip=-1)
    offset = np.array(red(w)["pos"]) - w.tool
    move(w, z=0.04, grip=-1, times=3)
    move(w, x=-0.04, y=-0.03, grip=-1)
    np.testing.assert_allclose(np.array(red(w)["pos"]) - w.tool, offset)
    move(w, yaw=0.1, grip=-1, times=5)
    turned = np.array(red(w)["pos"]) - w.tool
    np.testing.assert_allclose(turned, [-0.01 * np.sin(0.5), 0.01 * np.cos(0.5), 0.01])
    assert red(w)["yaw"] == pytest.approx(0.5)
    assert red(w)["support"] == "gripper"
    spot = red(w)["pos"][:2]
    move(w)
    assert red(w)["pos"] == pytest.approx([*spot, layout.BLOCK_HALF])
    assert red(w)["support"] == "table"


def test_held_block_does_not_go_through_the_table():
    w = world(tool=(0.0, 0.0, 0.035))
    move(w, grip=-1)
    move(w, z=-0.04, grip=-1, times=3)
    assert red(w)["pos"][2] == pytest.approx(layout.BLOCK_HALF)


def carried_over(dx, **blocks):
    """Red lifted, moved by `dx` and let go; the others are where `blocks` says."""
    w = world(**blocks)
    move(w, grip=-1)
    move(w, z=0.04, grip=-1, times=3)
    move(w, x=dx / 4, grip=-1, times=4)
    return w


def test_blocks_stack():
    w = carried_over(0.10, green=(0.10, 0.01, 0.0))
    move(w)
    assert red(w)["pos"][2] == pytest.approx(3 * layout.BLOCK_HALF)
    assert red(w)["support"] == "green"


def test_a_held_block_comes_to_stand_on_another():
    w = carried_over(0.10, green=(0.10, 0.01, 0.0))
    move(w, z=-0.04, grip=-1, times=5)
    assert red(w)["pos"][2] == pytest.approx(3 * layout.BLOCK_HALF)


def test_a_block_let_go_over_an_edge_tips_off():
    w = carried_over(0.10, green=(0.14, 0.0, 0.0))
    move(w)
    assert red(w)["pos"][2] == pytest.approx(layout.BLOCK_HALF)
    gap = w.blocks[1, 0] - w.blocks[0, 0]
    assert gap == pytest.approx(2 * layout.BLOCK_RADIUS, abs=1e-4)


def test_a_stack_is_carried_by_its_lowest_block_and_falls_without_it():
    w = carried_over(0.10, green=(0.10, 0.0, 0.0))
    move(w)
    w.tool[:] = [0.10, 0.0, 0.02]
    move(w, grip=-1)
    assert w.get_info()["robot_info"]["held"] == "green_block"
    move(w, z=0.04, grip=-1, times=2)
    move(w, y=-0.04, grip=-1)
    np.testing.assert_allclose(w.blocks[0] - w.blocks[1], [0, 0, 2 * layout.BLOCK_HALF], atol=1e-5)
    move(w)
    assert sorted(w.blocks[:2, 2]) == pytest.approx([layout.BLOCK_HALF, 3 * layout.BLOCK_HALF])
    w.blocks[1, 1] += 0.1
    move(w)
    assert red(w)["pos"][2] == pytest.approx(layout.BLOCK_HALF)


def test_closed_fingers_push_a_block():
    w = world(tool=(-0.1, -0.1, 0.02), red=(0.0, -0.1, 0.0))
    move(w, grip=-1, times=2)
    for _ in range(4):
        move(w, x=0.03, grip=-1)
    assert red(w)["pos"][0] > 0.03
    assert red(w)["pos"][2] == pytest.approx(layout.BLOCK_HALF)
    assert not contact.overlap(w._discs()[1], red(w)["pos"]) > 1e-5


def test_the_rim_stops_a_pushed_block_and_the_hand():
    w = world(tool=(0.2, -0.1, 0.02), green=(0.27, -0.1, 0.0))
    move(w, grip=-1, times=2)
    move(w, x=0.02, grip=-1, times=15)
    assert w.blocks[1, 0] <= layout.BLOCK_HIGH[0]
    assert w.tool[0] < layout.BLOCK_HIGH[0] - layout.BLOCK_RADIUS


def test_button_toggles_once_a_press():
    x, y = layout.BUTTON
    w = world(tool=(x, y, 0.1))
    led = []
    for z in (0.0, -0.04, -0.04, -0.04, 0.0, 0.04, 0.04, -0.04, -0.04, -0.04):
        move(w, z=z, grip=-1)
        led.append(w.get_info()["scene_info"]["led"])
    assert led == [False, False, True, True, True, True, True, True, False, False]
    assert w.tool[2] >= layout.BUTTON_TOP - layout.BUTTON_TRAVEL - 1e-9


def test_pressing_beside_the_button_does_nothing():
    x, y = layout.BUTTON
    w = world(tool=(x, y - 0.06, 0.1))
    move(w, z=-0.04, grip=-1, times=5)
    assert not w.get_info()["scene_info"]["led"]


def test_knob_follows_the_hand_along_its_rail_only():
    w = world(tool=(layout.RAIL_LEFT, layout.RAIL_Y, 0.022))
    move(w, grip=-1, times=2)
    assert w.get_info()["robot_info"]["held"] == "slider"
    move(w, x=0.03, y=-0.04, z=0.04, yaw=0.1, grip=-1, times=4)
    robot, scene = w.get_info()["robot_info"], w.get_info()["scene_info"]
    assert scene["slider"] == pytest.approx(0.5)
    assert robot["tcp_pos"] == pytest.approx([layout.RAIL_LEFT + 0.12, layout.RAIL_Y, 0.022])
    move(w, x=0.04, grip=-1, times=6)
    assert w.get_info()["scene_info"]["slider"] == 1.0
    move(w)
    move(w, x=-0.04, z=0.04, times=4)
    assert w.get_info()["scene_info"]["slider"] == 1.0
    assert w.get_info()["robot_info"]["held"] is None


def test_fingertips_push_the_knob():
    w = world(tool=(layout.RAIL_LEFT - 0.06, layout.RAIL_Y, 0.1))
    move(w, grip=-1, times=2)
    move(w, z=-0.04, grip=-1, times=2)
    move(w, x=0.03, grip=-1, times=4)
    right_tip = layout.RAIL_LEFT - 0.06 + 4 * 0.03 + layout.FINGER_HALF[0]
    reach = layout.KNOB_HALF[0] + layout.FINGER_RADIUS
    assert w.knob == pytest.approx(right_tip + reach)


def test_invariants_hold_whatever_is_commanded():
    """Random hands and an expert that keeps dropping things, through falls, stacks and pushes."""
    for seed in range(12):
        rng = np.random.RandomState(seed)
        w = World(tasks.initial_conditions(None, rng))
        expert = Expert(tasks.TASKS[seed % len(tasks.TASKS)])
        for step in range(150):
            if step % 50 < 20:
                action = np.append(rng.uniform(-1, 1, 6), rng.choice([-1, 1]))
                action[2] -= 0.3
            else:
                if step % 10 == 0:
                    expert = Expert(tasks.TASKS[rng.randint(len(tasks.TASKS))])
                action = expert.act(w)
                action[:6] += 0.5 * rng.normal(size=6)
                action[6] *= -1 if rng.uniform() < 0.05 else 1
            before = w.tool.copy()
            w.step(action)
            check_invariants(w)
            assert np.abs(w.tool - before).max() <= layout.ACTION_SCALE + 1e-9


def check_invariants(w):
    assert (w.blocks[:, 2] >= layout.BLOCK_HALF - 1e-9).all()
    assert (w.blocks[:, :2] >= np.array(layout.BLOCK_LOW) - 1e-9).all()
    assert (w.blocks[:, :2] <= np.array(layout.BLOCK_HIGH) + 1e-9).all()
    assert (w.tool >= np.array(layout.TOOL_LOW) - 1e-9).all()
    assert (w.tool <= np.array(layout.TOOL_HIGH) + 1e-9).all()
    assert layout.RAIL_LEFT <= w.knob <= layout.RAIL_RIGHT
    for i, block in enumerate(w.blocks):
        for other in w.blocks[:i]:
            disc = contact.as_disc(other)
            assert contact.overlap(disc, block) < 1e-3 or not contact.beside(disc, block)
        if i != w.held:
            below = contact.support(w.blocks, i)
            floor = 0.0 if below < 0 else w.blocks[below, 2] + layout.BLOCK_HALF
            assert block[2] - layout.BLOCK_HALF == pytest.approx(floor)
