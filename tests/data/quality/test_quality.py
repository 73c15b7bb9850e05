"""Each check of a dataset's quality on a small dataset that has the fault, and on sound ones."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import inspect_data
from vla_jax.data import features
from vla_jax.data.find_spec import find_spec
from vla_jax.data.first_spec import recorded_hz, source_code
from vla_jax.data.inspection import inspect
from vla_jax.data.quality import cameras, motion
from vla_jax.data.quality.check import check
from vla_jax.data.quality.texts import odd
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.data.spec import DatasetSpec, Trajectory

ROOT = Path(__file__).resolve().parents[3]
EPISODES, FRAMES, SIZE = 8, 48, 24
SPEC = DatasetSpec(
    images={"primary": "observation/front", "wrist": "observation/hand"},
    features={"action": "action", "state": "observation/state", "text": "instruction"},
    standardise=lambda e: Trajectory(e["action"], e["text"], e["state"]),
    gripper_env=(0.0, 1.0),
    hz=10.0,
)


def episode(number) -> dict[str, Any]:
    """A hand that moves in bursts; one camera sees it, the other rides on it."""
    rng = np.random.default_rng(number)
    # Bursts of motion with rests between, so that only one delay explains the pictures.
    burst = np.repeat(rng.choice([0.15, 1.0], FRAMES // 4 + 1), 4)[:FRAMES]
    action = rng.normal(0, 0.6, (FRAMES, 3)) * burst[:, None]
    action[:, 0] += burst
    state = np.cumsum(np.concatenate([rng.normal(size=(1, 3)), action[:-1]]), axis=0)
    gripper = (np.arange(FRAMES) < rng.integers(15, 35)).astype(float)
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    wall = rng.uniform(60, 180, (SIZE, SIZE))
    front, hand = [], []
    for x, y, z in state:
        blob = np.exp(-((rows - 0.5 - 0.3 * np.sin(y)) ** 2 + (columns - (x / 9) % 1) ** 2) * 60)
        front.append(wall * (1 - blob) + 250 * blob)
        hand.append(128 + 60 * np.sin(9 * rows + x) + 50 * np.cos(7 * columns + y + z))
    noise = rng.normal(0, 2, (2, FRAMES, SIZE, SIZE))
    return {
        "front": np.stack(front) + noise[0],
        "hand": np.stack(hand) + noise[1],
        "action": np.concatenate([action, gripper[:, None]], axis=1),
        "state": np.concatenate([state, gripper[:, None]], axis=1),
        "text": f"put the cup on plate {number % 3 + 1}",
    }


@pytest.fixture
def find(tmp_path):
    """Changes the world's episodes, writes them, and looks at them."""

    def run(change=lambda number, e: e, hz=10.0, recorded_hz=None, episodes=EPISODES):
        described = {
            "steps": {
                "observation": {
                    "front": features.image(SIZE, SIZE, "png"),
                    "hand": features.image(SIZE, SIZE, "png"),
                    "state": features.tensor((4,)),
                },
                "action": features.tensor((4,)),
                "instruction": features.text(),
            }
        }
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "1.0.0"
        with RLDSWriter(folder, "world", described) as out:
            for number in range(episodes):
                e = episode(number)
                e = change(number, e) or e
                pixels = {
                    k: np.repeat(np.clip(e[k], 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
                    for k in ("front", "hand")
                }
                observation = {**pixels, "state": e["state"].astype(np.float32)}
                action = e["action"].astype(np.float32)
                steps = {"observation": observation, "action": action, "instruction": e["text"]}
                out.write("train", {"steps": steps})
        spec = dataclasses.replace(SPEC, hz=hz)
        dataset = inspect("world", spec, folder, "train", str(tmp_path / "cache")).dataset
        return check(dataset, recorded_hz).issues

    return run


def only(issues, name):
    """The one issue there is, of this check."""
    assert [issue.check for issue in issues] == [name], [issue.line() for issue in issues]
    return issues[0]


def test_a_sound_world_has_no_issues(find):
    assert find() == []


def test_a_frozen_camera(find):
    def freeze(number, e):
        if number in (2, 5):
            e["hand"][20:] = e["hand"][20]

    issue = only(find(freeze), "camera_frozen")
    assert (issue.camera, issue.episodes) == ("wrist", (2, 5))
    assert "in 2 of 8 episodes: frames 20 to 47 of episode 2 show one picture" in issue.line()


def test_a_camera_may_stand_still_while_the_robot_does(find):
    def rest(number, e):
        for key in ("front", "hand", "state"):
            e[key][20:] = e[key][20]
        e["action"][20:] = 0

    assert [issue.check for issue in find(rest)] == []


@pytest.mark.parametrize("level", [0, 8, 200])
def test_black_and_plain_cameras(find, level):
    def cover(number, e):
        if number == 3:
            e["front"][:] = level

    issue = only(find(cover), "camera_black")
    assert (issue.camera, issue.episodes) == ("primary", (3,))


def test_one_camera_under_two_names(find):
    def double(number, e):
        if number > 4:
            e["hand"] = e["front"] + 0.3

    issue = only(find(double), "camera_doubled")
    assert issue.episodes == (5, 6, 7)
    assert "'primary' and 'wrist' show the same in 3 of 8 episodes" in issue.problem


@pytest.mark.parametrize(("late", "words"), [(7, "7 frames (0.7 s) behind"), (-7, "ahead of")])
def test_a_camera_out_of_step(find, late, words):
    def shift(number, e):
        frames = np.clip(np.arange(FRAMES) - late, 0, FRAMES - 1)
        e["hand"] = e["hand"][frames] + np.random.default_rng(number).normal(0, 2, e["hand"].shape)

    issue = only(find(shift), "camera_out_of_step")
    assert issue.camera == "wrist"
    assert words in issue.problem


def test_a_camera_may_be_a_little_late(find):
    def shift(number, e):
        e["hand"] = e["hand"][np.maximum(np.arange(FRAMES) - 2, 0)]

    assert find(shift) == []


def test_a_slow_camera(find):
    def halve(number, e):
        e["front"] = e["front"][np.arange(FRAMES) // 2 * 2]

    issue = only(find(halve), "camera_rate")
    assert "shows every picture 2 times: 5 pictures a second, not 10" in issue.line()


def test_jumps_of_the_state(find):
    def jump(number, e):
        if number == 4:
            e["state"][30:, :3] += 60
        e["state"][:, 1] = e["state"][:, 1] % (2 * np.pi)  # an angle may wrap

    issue = only(find(jump), "state_jump")
    assert issue.episodes == (4,)
    assert "the first time behind frame 29 of episode 4" in issue.problem


def test_grippers_that_never_move(find):
    def still(number, e):
        e["action"][:, 3] = e["state"][:, 3] = 1

    assert "always 1" in only(find(still), "gripper_still").problem

    def one(number, e):
        if number == 20:
            e["action"][:, 3] = 0

    issue = only(find(one, episodes=21), "gripper_still")
    assert issue.episodes == (20,)


def test_near_duplicates(find):
    def copy(number, e):
        if number == 6:
            other = episode(1)
            return {**e, "action": other["action"] + 1e-4, "state": other["state"] - 1e-4}
        return None

    issue = only(find(copy), "near_duplicate")
    assert issue.episodes == (6,)
    assert "episode 6 as 1" in issue.problem


def test_a_rate_that_is_not_so(find):
    def twice(number, e):
        return {k: v if k == "text" else v[np.arange(FRAMES) // 2] for k, v in e.items()}

    issues = find(twice)
    assert [issue.check for issue in issues] == ["control_rate", "camera_rate", "camera_rate"]
    assert "every row stands 2 times: 10 a second are really 5" in issues[0].line()
    issue = only(find(recorded_hz=30.0), "control_rate")
    assert issue.problem == "the spec says 10 actions a second, the dataset's files 30"


def test_missing_and_odd_instructions(find):
    texts = {1: "", 2: "task_0", 3: "pick_up_the_cup", 4: "ouvrir le tiroir arri\u00c3\u00a8re"}

    def write(number, e):
        e["text"] = texts.get(number, e["text"])

    issues = find(write)
    assert {issue.check for issue in issues} == {"instruction_missing", "instruction_odd"}
    assert [issue.episodes for issue in issues] == [(1,), (2,), (3,), (4,)]
    assert "1 instructions are placeholders, such as 'task_0' (episode 2)" in issues[1].line()


def test_what_is_odd_to_say():
    sound = ["open it", "test the drawer", "\u6253\u5f00", "go to 3 o'clock", "None of the blocks"]
    assert [text for text in sound if odd(text)] == []
    bad = ["None", "TODO", "task 12", "x", "12", '{"task": 1}', "b'open'", "\ufffdpen", "a " * 200]
    assert [text for text in bad if not odd(text)] == []


def test_correlations_are_at_their_delay():
    rng = np.random.default_rng(0)
    course = [rng.uniform(size=60) ** 4 for _ in range(3)]
    later = [np.concatenate([np.zeros(5), x[:-5]]) for x in course]
    assert int(cameras.correlations(later, course, 10).argmax()) - 10 == 5
    assert int(cameras.correlations(course, later, 10).argmax()) - 10 == -5


def test_rows_that_repeat():
    same = np.arange(1, 90) % 3 != 0
    assert motion.repeats(same, [0, 90]) == 3
    assert motion.repeats(same, [0, 45, 90]) == 3
    assert motion.repeats(np.zeros(89, bool), [0, 90]) == 1
    assert motion.repeats(np.ones(89, bool), [0, 90]) == 1  # a robot that waits


def test_real_recordings_have_no_issues(tmp_path):
    """LeRobot with a video, and RLDS (whose gripper stays open)."""
    fixtures = ROOT / "tests" / "fixtures"
    cache = str(tmp_path / "cache")
    bridge = fixtures / "bridge_dataset" / "1.0.0"
    report = inspect("bridge", find_spec("bridge_dataset"), bridge, "train", cache)
    assert [issue.check for issue in check(report.dataset).issues] == ["gripper_still"]
    pytest.importorskip("av")
    robot = fixtures / "unitree_g1"
    (tmp_path / "g1.py").write_text(source_code("g1", robot))
    spec = find_spec(f"{tmp_path / 'g1.py'}:g1")
    quality = check(inspect("g1", spec, robot, "train", cache).dataset, recorded_hz(robot))
    assert quality.issues == []
    assert quality.lines(1) == [
        "pictures of camera primary: 120 frames of 1 of 1 episodes looked at"
    ]


def test_the_command_writes_a_report(tmp_path, monkeypatch, capsys):
    data = ROOT / "tests" / "fixtures" / "bridge_dataset" / "1.0.0"
    report = tmp_path / "new" / "report.json"
    flags = [f"--cache={tmp_path}", f"--out={tmp_path}", f"--report={report}"]
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", str(data), *flags])
    monkeypatch.setattr(inspect_data, "action_plot", lambda *_: None)
    inspect_data.main()
    assert "the gripper never moves: always 1. If the robot has one" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert (content["format"], content["dataset"]) == (1, "bridge_dataset")
    assert [issue["check"] for issue in content["issues"]] == ["gripper_still"]
    assert content["looked_at"]["primary"]["frames"] > 20
