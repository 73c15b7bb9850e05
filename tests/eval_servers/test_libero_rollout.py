"""The adapter, the suites and the script around a LIBERO without MuJoCo."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_servers import cli, findings, rollout, sanity, video
from eval_servers.client import PolicyClient
from eval_servers.libero import expert, simulator, suites
from eval_servers.libero import probe as libero_probe
from eval_servers.libero import rollout as script
from eval_servers.libero.env import SCENE_KEY, film
from eval_servers.libero.profiles import PROFILES
from tests.eval_servers.fake_libero import FakeSimulator, StayingPolicy, make_env
from tests.eval_servers.libero_expert_policy import ExpertPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval_servers" / "libero" / "rollout.py"


@pytest.fixture
def policy():
    return StayingPolicy()


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        yield uri


def test_every_suite_has_its_tasks():
    assert len(suites.SUITES) == 5 + 16
    sizes = {suite: len(suites.tasks(suite)) for suite in suites.SUITES}
    assert sizes.pop("90") == 90
    assert set(sizes.values()) == {10}
    assert suites.MAX_STEPS == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    for suite in suites.SUITES:
        separate, plain = suites.tasks(suite), suites.tasks(suites.plain(suite))
        assert [task.name for task in separate] == [task.name for task in plain]
        assert all(task.instruction.strip() == task.instruction != "" for task in separate)
    with pytest.raises(ValueError, match="no suite 'goal_env'"):
        suites.tasks("goal_env")


def test_what_is_told_is_the_problem_files_only_where_the_name_is_old():
    def told(suite):
        return [task.instruction for task in suites.tasks(suite)]

    assert told("goal")[0] == "open the middle drawer of the cabinet"
    assert told("goal_task")[0] == "open the bottom drawer of the cabinet"
    assert told("goal_lan")[1] == "place the bowl on the stove"
    for plain in suites.PERTURBED:
        assert told(plain + "_swap") == told(plain + "_object") == told(plain)
        assert not set(told(plain + "_task")) & set(told(plain))
    assert told("10")[0] == "put both the alphabet soup and the tomato sauce in the basket"


def test_trials_keep_their_index_however_many_are_run():
    subset = suites.trials("object_swap", [3, 1], 2)
    assert [(t.index, t.seed, t.number) for t in subset] == [(150, 0, 3), (151, 1, 3), (50, 0, 1),
                                                           (51, 1, 1)]  # fmt: skip
    everything = {trial.index: trial for trial in suites.trials("object_swap")}
    assert len(everything) == 500
    assert all(everything[trial.index] == trial for trial in subset)
    swapped = suites.trials("object", [0, 1, 2], 1, swap_instructions=True)
    separate = suites.trials("object", [0, 1, 2], 1)
    assert {t.instruction for t in swapped} == {t.instruction for t in separate}
    assert all(a.instruction != b.instruction for a, b in zip(separate, swapped, strict=True))
    for numbers, count in (([10], 1), (None, 51), (None, 0)):
        with pytest.raises(ValueError, match=r"it has 0 to 9|there are 1 to 50"):
            suites.trials("object", numbers, count)


def test_an_episode_is_reset_as_its_profile_says_and_drawn_when_asked(uri, policy):
    env = make_env(privileged=False)
    trial = suites.trials("goal", [4], 3)[2]
    with PolicyClient(uri) as client:
        row = rollout.run_episode(env, client, trial, 20, PROFILES["openpi"].execute_steps)
    simulated = env._simulator
    assert simulated.resets == [("goal", "put_the_bowl_on_top_of_the_cabinet", 7, 2, 10)]
    assert simulated.drawn == ["image", "wrist_image"] * 4  # at steps 0, 5, 10, 15
    assert (row.steps, row.success, row.more["suite"], row.more["number"]) == (20, False, "goal", 4)
    assert [int(obs["observation/image"][1, 0, 0]) for obs in policy.asked] == [20, 25, 30, 35]
    assert {o["prompt"] for o in policy.asked} == {"put the bowl on top of the cabinet"}
    assert policy.asked[0]["observation/state"].shape == (8,)
    openvla = make_env("openvla")
    openvla.reset(trial)
    assert openvla._simulator.resets[0][2] == 0


def test_only_the_cameras_that_the_policy_takes_are_drawn_again(policy):
    policy.metadata["cameras"] = {"primary": "observation/image"}
    env = make_env()
    with (
        server.background(policy, server.ServerOptions(port=0)) as uri,
        PolicyClient(uri) as client,
    ):
        rollout.run_episode(env, client, suites.trials("goal", [4], 1)[0], 10, 5)
    assert env._simulator.drawn == ["image", "wrist_image", "image"]
    assert set(policy.asked[1]) == {"observation/image", "observation/state", "prompt"}


def test_a_film_is_drawn_afterwards_and_ends_with_the_end(monkeypatch):
    saved = []
    monkeypatch.setattr(video, "save_video", lambda path, frames, fps: saved.append((frames, fps)))
    env = make_env()
    env.reset(suites.trials("goal", [0], 1)[0])
    frames = [env.frame()]
    for _ in range(200):
        env.step(np.append(np.zeros(6), -1))
        frames.append(env.frame())
    assert env._simulator.drawn == ["image", "wrist_image"]
    film("film.webp", frames)
    ((pictures, fps),) = saved
    assert [picture[1, 0, 0] for picture in pictures] == [20 + i % 200 for i in range(2, 201, 3)]
    assert pictures[0].shape == (32, 64, 3)
    assert fps == 20 / 3


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.append(np.zeros(6), 1.5)])
def test_actions_that_do_not_fit(action):
    env = make_env()
    env.reset(suites.trials("goal", [0], 1)[0])
    with pytest.raises(rollout.ActionError, match="7 finite numbers"):
        env.step(action)


def test_the_expert_through_server_client_and_action_path(tmp_path):
    episodes = suites.trials("object", [0, 1], 3)
    with server.background(ExpertPolicy(), server.ServerOptions(port=0)) as uri:
        options = rollout.Options(uri, max_steps=280, workers=2, connect_timeout=10.0)
        make = functools.partial(make_env, crash_on=51)
        out = tmp_path / "run"
        score = rollout.evaluate(make, episodes, str(out), options, {"suite": "object"}, film)
    assert (score["successes"], score["episodes"], score["crashes"]) == (5, 5, 1)
    assert score["protocol"]["server"]["gripper"] == {"closed": 1.0, "open": -1.0}
    assert len(list((out / "videos").glob("*.webp"))) == 2


def test_the_sanity_suite_knows_its_commands(uri, policy):
    policy.metadata["gripper"] = {"closed": -1.0, "open": 1.0}
    policy.metadata["action"] = {"low": [-1.0] * 6, "high": [1.0] * 6, "gripper_open": 0.5}
    with (
        server.background(policy, server.ServerOptions(port=0)) as other,
        PolicyClient(other) as client,
    ):
        results = {
            f.name: f for f in sanity.check(make_env(), client, suites.trials("object", None, 1))
        }
    assert results["gripper commands"].level == "fail"
    assert "open where it should close" in results["gripper commands"].advice
    assert results["simulator's units"].level == "ok"
    assert findings.worst(results.values()) == "fail"


@pytest.fixture
def drawn(monkeypatch):
    """The script with a simulator that need not be probed."""
    answers = {"renderer": "egl", "driver": "none", "versions": {"mujoco": "2.3.7"}}
    monkeypatch.setattr(script, "probe", lambda *_: answers)
    monkeypatch.setattr(script, "make_env", lambda settings, profile, privileged: make_env())


@pytest.mark.parametrize(
    ("flags", "profile"),
    [
        (["--suite=object"], "openpi"),
        (["--suite=object_swap"], "openpi"),
        (["--suite=10", "--profile=openvla"], "openvla"),
        (["--suite=10", "--profile=openvla", "--execute-steps=5"], "custom"),
        (["--suite=10", "--episodes=49"], "custom"),
        (["--suite=10", "--max-steps=400"], "custom"),
        (["--suite=10", "--size=128"], "custom"),
        (["--suite=10", "--privileged"], "custom"),
        (["--suite=10", "--swap-instructions"], "custom"),
        (["--suite=10", "--tasks", "0"], "custom"),
    ],
)
def test_a_score_says_whose_protocol_it_is_of(drawn, flags, profile):
    parsed = script._parse_flags(flags)
    message = script._prepare(parsed).protocol
    assert message["profile"] == profile
    assert message["suite"] == parsed.suite
    assert message["perturbation"] == ("swap" if "swap" in parsed.suite else None)
    assert message["fixtures_seed"] == (0 if "--profile=openvla" in flags else 7)
    assert message["simulator"]["versions"]["mujoco"] == "2.3.7"
    if profile != "custom":
        assert parsed.max_steps == suites.MAX_STEPS[suites.plain(parsed.suite)]
        assert parsed.execute_steps == (1 if profile == "openvla" else 5)


def test_the_script_end_to_end(drawn, uri, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.rollout, "check_imports", lambda: None)  # jax serves in this process
    flags = [f"--server={uri}", f"--out={tmp_path / 'run'}", "--suite=spatial_lan", "--tasks", "0"]
    parsed = script._parse_flags([*flags, "--episodes=2", "--workers=1", "--max-steps=5"])
    case = script._prepare(parsed)
    picklable = cli.Evaluation(make_env, case.episodes, case.protocol, film)
    assert cli.main(parsed, lambda _: picklable) == 0
    assert capsys.readouterr().out.startswith("success 0.0 % (0/2")
    score = json.loads((tmp_path / "run" / "score.json").read_text())
    assert list(score["per_task"]) == [suites.tasks("spatial")[0].name]
    assert score["protocol"]["execute_steps"] == 5
    assert score["latency_ms"]["round_trip"]["count"] == 2


def test_no_libero_is_one_clear_line(tmp_path):
    flags = ["--server=ws://127.0.0.1:9", f"--out={tmp_path / 'run'}", f"--frame={tmp_path / 'f'}"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("rollout: the simulator gives no picture")
    assert "eval_servers/libero/setup.sh" in done.stderr
    assert not (tmp_path / "run").exists()


def test_another_renderer_is_refused():
    with pytest.raises(simulator.SimulatorError, match="'glx' is none of"):
        simulator.Simulator(simulator.Settings("glx"))


def test_the_probe_asks_for_the_evaluations_own_world(monkeypatch):
    asked = []
    monkeypatch.setattr(libero_probe.aside, "ask", lambda *args: asked.append(args) or {})
    settings = simulator.Settings("osmesa", 128)
    libero_probe.probe(settings, PROFILES["openvla"], "goal_task", 3)
    assert asked[0][1] == ["--suite=goal_task", "--task=3", "--seed=0", "--renderer=osmesa",
                           "--size=128"]  # fmt: skip


def test_rotation_vectors_have_angles_up_to_two_pi():
    half = simulator.rotation_vector(np.array([1.0, 0.0, 0.0, 0.0]))
    assert half == pytest.approx([np.pi, 0, 0])
    far = simulator.rotation_vector(np.array([0.0, np.sin(2.5), 0.0, np.cos(2.5)]))
    assert far == pytest.approx([0, 5, 0])
    assert not simulator.rotation_vector(np.array([0.0, 0.0, 0.0, 1.0])).any()


def test_the_fake_is_solved_by_letting_go_in_the_basket():
    fake = FakeSimulator()
    fake.reset("object", "x", 7, 0, 10)
    assert not fake.solved()
    assert SCENE_KEY not in make_env(privileged=False).reset(suites.trials("goal", [0], 1)[0])


def test_there_is_a_script_for_what_it_was_seen_to_do():
    assert expert.scripted("object") == list(range(10))
    assert expert.scripted("spatial") == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert expert.scripted("goal") == [1, 4, 6, 8]
    with pytest.raises(ValueError, match="no script for 'turn on the stove'"):
        expert.Expert("turn on the stove")
