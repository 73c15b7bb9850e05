import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from eval_servers.tabletop import demo, render, tasks
from eval_servers.tabletop.env import TabletopEnv
from eval_servers.tabletop.expert import Expert
from eval_servers.tabletop.world import World

STAY = [0, 0, 0, 0, 0, 0, 1]
# Prints a digest of two whole steps; then which modules the world pulled in.
PROBE = """
import hashlib, sys
from eval_servers.tabletop.env import TabletopEnv
env = TabletopEnv(64)
env.reset(11, "place_blue_left")
obs = env.step([0.5, -0.5, -1, 0, 0, 0.2, -1])
print(hashlib.sha256(b"".join(obs[k].tobytes() for k in sorted(obs))).hexdigest())
import eval_servers.tabletop.expert, eval_servers.tabletop.demo
print(" ".join(sorted({m.split(".")[0] for m in sys.modules})))
"""


def digest(obs):
    return hashlib.sha256(b"".join(obs[k].tobytes() for k in sorted(obs))).hexdigest()


def coloured(image, channel):
    """Pixels in which one colour channel clearly rules."""
    image = image.astype(int)
    remainder = np.delete(image, channel, axis=-1).max(-1)
    return image[..., channel] > 1.8 * remainder + 20


def info_with(**changes):
    """Info of a state with the tool high at the back, out of the way, and `changes` made."""
    conditions = tasks.initial_conditions(None, np.random.RandomState(0))
    conditions["blocks"] = {"red": (0.0, -0.1, 0.0), "green": (0.1, 0.05, 0.0)}
    conditions["blocks"]["blue"] = (-0.1, 0.05, 0.0)
    conditions["tool"] = (0.0, 0.2, 0.3)
    conditions["led"] = False
    conditions.update(changes)
    return World(conditions).get_info()


def test_observation_shapes_and_types():
    env = TabletopEnv((48, 32))
    for obs in (env.reset(0), env.step(STAY), env.get_obs()):
        assert obs["rgb_static"].shape == (48, 48, 3)
        assert obs["rgb_gripper"].shape == (32, 32, 3)
        assert obs["rgb_static"].dtype == obs["rgb_gripper"].dtype == np.uint8
        assert obs["robot_obs"].shape == (15,)
        assert obs["robot_obs"].dtype == np.float32


def test_robot_obs_says_what_the_info_says():
    env = TabletopEnv(16)
    env.reset(1)
    obs = env.step([1, 0, 0, 0, 0, 1, -1])["robot_obs"]
    robot = env.get_info()["robot_info"]
    np.testing.assert_allclose(obs[:3], robot["tcp_pos"], rtol=1e-6)
    np.testing.assert_allclose(obs[3:6], robot["tcp_orn"], atol=1e-7)
    assert obs[5] == pytest.approx(0.1)
    assert obs[6] == pytest.approx(0.06)
    assert obs[14] == -1


def test_same_seed_same_frames_in_this_and_another_process():
    env = TabletopEnv(64)
    digests = []
    for _ in range(2):
        env.reset(11, "place_blue_left")
        digests.append(digest(env.step([0.5, -0.5, -1, 0, 0, 0.2, -1])))
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    present, modules = done.stdout.splitlines()
    assert digests == [present, present]
    assert digest(env.reset(12, "place_blue_left")) != digest(env.reset(11, "place_blue_left"))
    forbidden = {"jax", "jaxlib", "flax", "torch", "tensorflow", "vla_jax", "OpenGL", "matplotlib"}
    assert not forbidden & set(modules.split())


def test_the_scene_depends_on_the_seed_not_on_the_task():
    env = TabletopEnv(16)
    scenes = []
    for task in (None, *tasks.TASKS):
        env.reset(5, task)
        scenes.append(env.get_info()["scene_info"]["blocks"])
    assert all(scene == scenes[0] for scene in scenes)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ([0] * 6, "shape"),
        ([[0] * 7], "shape"),
        ([0, 0, 0, 0, 0, 0, 0], "gripper"),
        ([0, 0, 0, 0, 0, 0, 0.999], "gripper"),
        ([0, float("nan"), 0, 0, 0, 0, 1], "not finite"),
        ([float("inf"), 0, 0, 0, 0, 0, 0], "not finite at \\[0\\]; gripper"),
        ("open", "7 numbers"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(action, said):
    env = TabletopEnv(16)
    env.reset(0)
    before = env.get_info()
    with pytest.raises(ValueError, match=said):
        env.step(action)
    assert env.get_info() == before


def test_misuse_is_refused_with_the_legal_choices():
    wrong: list[Any] = [0, 64.5, (64, 64, 3)]
    for size in wrong:
        with pytest.raises(ValueError, match="image_size"):
            TabletopEnv(size)
    with pytest.raises(RuntimeError, match="reset"):
        TabletopEnv().get_obs()
    env = TabletopEnv(16)
    with pytest.raises(ValueError, match=r"did you mean 'lift_red_block'.*turn_on_led"):
        env.reset(0, "lift_red_blok")
    env.reset(0)
    with pytest.raises(ValueError, match="no task"):
        Expert().act(env)
    with pytest.raises(ValueError, match="'static', 'gripper'"):
        render.render(env.get_info(), "top", 64)


def test_reported_info_is_a_copy():
    env = TabletopEnv(16)
    env.reset(0)
    env.get_info()["scene_info"]["blocks"]["red"]["pos"][0] = 9.0
    env.get_info()["robot_info"]["tcp_pos"][0] = 9.0
    assert env.get_info()["scene_info"]["blocks"]["red"]["pos"][0] < 1
    assert env.get_info()["robot_info"]["tcp_pos"][0] < 1


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_blocks_are_five_pixels_wide_and_map_almost_linearly(channel):
    colour = ("red", "green", "blue")[channel]
    elsewhere = [(-0.25, 0.1, 0.0), (0.25, 0.1, 0.0)]
    spots, centres = [], []
    for x in (-0.12, 0.0, 0.12):
        for y in (-0.2, -0.08, 0.04):
            remaining = iter(elsewhere)
            blocks = {
                c: (x, y, 0.0) if c == colour else next(remaining) for c in ("red", "green", "blue")
            }
            observed = coloured(render.render(info_with(blocks=blocks), "static", 64), channel)
            rows, columns = np.nonzero(observed)
            assert np.ptp(columns) + 1 >= 5
            assert np.ptp(rows) + 1 >= 5
            spots.append((x, y, 1.0))
            centres.append((columns.mean(), rows.mean()))
    spots, centres = np.array(spots), np.array(centres)
    fit, *_ = np.linalg.lstsq(spots, centres, rcond=None)
    assert np.abs(spots @ fit - centres).max() < 1.0
    assert fit[0, 0] > 60  # pixels a metre: x to the right
    assert fit[1, 1] < -60  # y upwards


def test_led_and_slider_are_visible():
    dark = render.render(info_with(slider=0.0), "static", 64).astype(int)
    lit = render.render(info_with(slider=0.0, led=True), "static", 64).astype(int)
    moved = render.render(info_with(slider=1.0), "static", 64).astype(int)
    assert (np.abs(lit - dark).max(-1) > 100).sum() >= 12
    changed = np.nonzero(np.abs(moved - dark).max(-1) > 60)[1]
    assert len(changed) >= 8
    assert np.ptp(changed) >= 15  # columns: it left one end and arrived at the other


def test_gripper_camera_sees_the_target_between_the_fingers_before_grasping():
    env, expert = TabletopEnv(64), Expert()
    for seed in range(5):
        obs = env.reset(seed, "lift_red_block")
        while expert.act(env)[6] > 0:
            obs = env.step(expert.act(env))
        columns = np.nonzero(coloured(obs["rgb_gripper"], 0))[1]
        assert len(columns) > 100
        assert abs(columns.mean() - 32) < 8
        assert coloured(obs["rgb_static"], 0).sum() >= 5  # nor does the tool hide it
        closed = env.step([0, 0, 0, 0, 0, 0, -1])
        for camera, changed in (("rgb_static", 8), ("rgb_gripper", 100)):
            step = np.abs(closed[camera].astype(int) - obs[camera]).max(-1)
            assert (step > 40).sum() > changed


def test_gripper_camera_turns_with_the_tool():
    env = TabletopEnv(64)
    env.reset(0)
    before = env.get_obs()
    for _ in range(5):
        after = env.step([0, 0, 0, 0, 0, 1, 1])
    gap = np.abs(after["rgb_gripper"].astype(int) - before["rgb_gripper"]).mean()
    assert gap > 5 * np.abs(after["rgb_static"].astype(int) - before["rgb_static"]).mean()


def test_demo_writes_an_animation(tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "lift.gif"
    assert demo.main(["--task", "lift_green_block", "--size", "48", "--out", str(path)]) == 0
    with Image.open(path) as film:
        assert film.size == (96, 48)
        assert getattr(film, "n_frames", 1) >= 8
    assert [p.name for p in tmp_path.iterdir()] == ["lift.gif"]
    capsys.readouterr()
    assert demo.main(["--list"]) == 0
    listing = capsys.readouterr().out
    assert all(task in listing and tasks.instruction(task) in listing for task in tasks.TASKS)
