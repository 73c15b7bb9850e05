import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from eval_servers import compare, results, rollout
from eval_servers.client import PolicyClient, SessionLostError
from eval_servers.simpler import scores, simulator
from eval_servers.simpler.env import SCENE_KEY, SimplerEnv, attempt, film
from eval_servers.simpler.profiles import PROFILES, Gripper, Profile
from eval_servers.simpler.rollout import table
from eval_servers.simpler.tasks import GOOGLE, WIDOWX
from eval_servers.simpler.worlds import Start, World, worlds
from tests.eval_servers.fake_simpler import (
    APPLE,
    CARROT,
    STACK,
    FakeSimulator,
    PushingPolicy,
    make_env,
    make_trials,
)
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval_servers" / "simpler" / "rollout.py"


@pytest.fixture
def policy():
    return PushingPolicy()


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        yield uri


def run_one(uri, trial, env=None, max_steps=200, frames=None, **options):
    with PolicyClient(uri) as client:
        return rollout.run_episode(
            env or make_env(), client, trial, max_steps, frames=frames, attempt=attempt, **options
        )


def test_an_episode_goes_to_its_end(uri, policy):
    frames = []
    row = run_one(uri, make_trials()[1], frames=frames)
    assert (row.success, row.steps, row.more["solved_at"]) == (True, 60, 4)
    assert row.more["told"] == ["stack the green block on the yellow block"]
    assert set(policy.prompts) == set(row.more["told"])
    assert row.more["stats"] == {"moved": True, "is_drawer_open": True, "qpos": pytest.approx(1.8)}
    assert len(row.round_trip_ms) == len(row.server_ms) == 60
    assert len(frames) == 61
    assert np.asarray(Image.open(io.BytesIO(frames[0]))).shape == (48, 64, 3)
    assert json.loads(json.dumps(row.to_json()))["variant"] == "base"


def test_a_success_may_be_lost_again(uri, policy):
    policy.back = 31
    row = run_one(uri, make_trials()[0])
    assert (row.success, row.steps, row.more["solved_at"]) == (False, 60, 4)


def test_a_profile_may_stop_at_success(uri, policy):
    policy.back = 31
    profile = Profile("mine", {WIDOWX: Gripper(False)}, stops=True)
    row = run_one(uri, make_trials()[0], make_env(profile))
    assert (row.success, row.steps, row.more["solved_at"]) == (True, 4, 4)


def test_fewer_steps_than_the_task_has(uri):
    row = run_one(uri, make_trials()[0], max_steps=3)
    assert (row.success, row.steps) == (False, 3)


@pytest.mark.parametrize(("name", "switched"), [("robovlms", True), ("official", False)])
def test_the_second_half_of_a_task(uri, policy, name, switched):
    policy.words, policy.gripper = "open", 0.0
    simulator = FakeSimulator()
    env = SimplerEnv(simulator, GOOGLE, PROFILES[name])
    row = run_one(uri, make_trials(1, [APPLE])[0], env, max_steps=20)
    halves = ["open top drawer", "place apple into top drawer"]
    assert row.more["told"] == (halves if switched else halves[:1])
    assert (row.steps, len(row.round_trip_ms)) == (20, 20)
    assert policy.sessions == 1 + switched  # history starts afresh
    # It knows how to open only: 7 pushes.
    assert sum(action[0] > 0 for action in simulator.told) == (7 if switched else 20)


def test_the_gripper_forgets_between_episodes_and_remembers_within():
    simulator = FakeSimulator()
    env = SimplerEnv(simulator, GOOGLE, PROFILES["robovlms"])
    trial = make_trials(1, [APPLE])[0]
    closed, opened = np.zeros(7), np.eye(7)[6]
    for _ in range(2):
        env.reset(trial)
        for action in (closed, opened, opened, opened):
            env.step(action)
        assert [message[6] for message in simulator.told] == [0, -2, -2, 0]


def test_a_connection_lost_while_a_world_is_built_costs_nothing():
    class Client:
        metadata: ClassVar = {}
        resets = 0

        def reset(self):
            self.resets += 1
            if self.resets == 1:
                raise SessionLostError("no pong")

        def infer(self, obs):
            return {"actions": np.full((1, 7), 0.05, np.float32)}

    client = Client()
    env = make_env()
    row = rollout.run_episode(env, client, make_trials()[0], 3, attempt=attempt)
    assert (row.restarts, row.steps, row.success, client.resets) == (0, 3, True, 1)


def test_swapped_instructions_stay(uri, policy):
    from eval_servers.simpler.trials import trials

    first = trials([STACK, CARROT], "visual_matching", 1, swap=True)[0]
    row = run_one(uri, first)
    assert row.more["told"] == ["put carrot on plate"]
    assert not row.success


def test_another_version_of_the_simulator_is_noticed(uri):
    env = SimplerEnv(FakeSimulator("stack the cubes"), WIDOWX, PROFILES["robovlms"])
    with pytest.raises(rollout.ActionError, match=r"'stack the cubes'.*'stack the green block"):
        run_one(uri, make_trials()[0], env)


def test_a_server_with_a_grippers_memory_is_refused(policy):
    policy.metadata["action"] = {"gripper_repeat": 2, "gripper_patience": 1}
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        with pytest.raises(rollout.ActionError, match="serve without --gripper-repeat"):
            run_one(uri, make_trials()[0])
        assert policy.prompts == []


@pytest.mark.parametrize(
    "action",
    [np.zeros(6), np.full(7, np.nan), np.append(np.zeros(6), 1.5), np.append(np.zeros(6), -1.5)],
)
def test_actions_that_do_not_fit(action):
    env = make_env()
    env.reset(make_trials()[0])
    with pytest.raises(rollout.ActionError, match="7 finite numbers"):
        env.step(action)


def test_observations():
    env = SimplerEnv(FakeSimulator(), WIDOWX, PROFILES["robovlms"], privileged=True)
    obs = env.reset(make_trials()[0])
    assert {key: (value.shape, value.dtype.name) for key, value in obs.items()} == {
        "observation/image": ((48, 64, 3), "uint8"),
        SCENE_KEY: ((3, 3), "float32"),
    }
    assert env.gripper == {"closed": -1, "open": 1}
    google = SimplerEnv(FakeSimulator(), GOOGLE, PROFILES["official"])
    assert google.gripper == {"closed": 0, "open": 1}


def test_worlds_are_built_once_in_a_row():
    simulator = FakeSimulator("pick coke can")
    env = SimplerEnv(simulator, GOOGLE, PROFILES["robovlms"])
    chosen = make_trials(8, ["google_robot_pick_standing_coke_can"])
    for trial in chosen:
        env.reset(trial)
    assert len(simulator.built) == 4
    assert simulator.built == list(worlds(chosen[0].task, "visual_matching").values())


def evaluate(uri, out, tasks=(STACK, CARROT), setting="visual_matching", count=2):
    options = rollout.Options(uri, max_steps=200, connect_timeout=10.0)
    protocol = {
        "environment": "simpler", "profile": "robovlms", "setting": setting, "robot": WIDOWX,
        "tasks": list(tasks), "simulator": {"driver": "none"},
    }  # fmt: skip
    episodes = make_trials(count, tasks)
    return rollout.evaluate(make_env, episodes, str(out), options, protocol, film, attempt)


def test_an_evaluation_and_its_scores(uri, tmp_path):
    score = evaluate(uri, tmp_path / "one")
    assert (score["episodes"], score["successes"], score["crashes"]) == (4, 2, 0)
    shown = table(score)
    assert shown.splitlines()[0] == "visual_matching (robovlms), widowx"
    assert "widowx_stack_cube" in shown
    assert "100.0% (2/2)" in shown
    assert len(list((tmp_path / "one" / "videos").glob("*.webp"))) == 2
    collected = scores.collect([("mine", str(tmp_path / "one"))])
    assert collected["visual_matching"][STACK]["mine"].rate == 1
    assert (
        scores.average(collected, "mine", [("visual_matching", t) for t in (STACK, CARROT)]) == 0.5
    )
    with pytest.raises(results.ResultsError, match="a second time"):
        scores.collect([("mine", str(tmp_path / "one"))] * 2)


def fake_run(folder, per_task, setting="visual_matching", robot=GOOGLE, **protocol):
    folder.mkdir()
    rows = [
        rollout.Row(i, i, task, "", success=i < solved, steps=1)
        for task, (solved, tried) in per_task.items()
        for i in range(tried)
    ]
    protocol = {"environment": "simpler", "setting": setting, "robot": robot, **protocol}
    results.write_score(str(folder / "score.json"), results.summarize(rows, protocol))
    return str(folder)


def test_settings_are_never_mixed(tmp_path):
    near = "google_robot_move_near"
    runs = [("a", fake_run(tmp_path / s, {near: (k, 10)}, s)) for s, k in
            (("visual_matching", 3), ("variant_aggregation", 7))]  # fmt: skip
    collected = scores.collect(runs)
    shown = scores.text(collected, scores.read_real(""))
    assert "30.0%" in shown
    assert "70.0%" in shown
    assert "50.0%" not in shown
    with pytest.raises(ValueError, match=r"different quantities.*variant_aggregation, visual"):
        scores.average(collected, "a", [(setting, near) for setting in collected])
    for _, folder in runs:
        protocol = json.loads(Path(folder, "score.json").read_text())["protocol"]
        Path(folder, "protocol.json").write_text(json.dumps(protocol))
        Path(folder, "episodes.jsonl").touch()
    with pytest.raises(compare.ProtocolError, match=r"setting \(visual_matching / variant_agg"):
        results.merge([folder for _, folder in runs], str(tmp_path / "merged"))


def test_profiles_are_not_put_side_by_side(tmp_path):
    per_task = {"google_robot_move_near": (1, 2)}
    runs = [(p, fake_run(tmp_path / p, per_task, profile=p)) for p in ("official", "robovlms")]
    with pytest.raises(compare.ProtocolError, match="profile"):
        scores.collect(runs)


def test_agreement_with_the_real_robot(tmp_path, capsys):
    near, rates = "google_robot_move_near", {"rt-1-x": 3, "octo-base": 1, "rt-2-x": 8, "mine": 9}
    runs = []
    for name, solved in rates.items():
        runs += ["--run", f"{name}={fake_run(tmp_path / name, {near: (solved, 10)})}"]
    assert scores._main(runs) == 0
    assert "no MMRV: a ranking needs at least 4" in capsys.readouterr().out
    real = tmp_path / "real.json"
    real.write_text(json.dumps({near: {"mine": 0.533}}))
    assert scores._main([*runs, f"--real={real}"]) == 0
    # Simulation puts mine (really 0.533) above rt-2-x (0.733); the others are in order.
    assert f"MMRV {2 * 0.2 / 4:.3f}" in capsys.readouterr().out
    real.write_text(json.dumps({near: {"rt-1-x": 0.5}}))
    assert scores._main([*runs, f"--real={real}"]) == 1
    assert "published otherwise" in capsys.readouterr().err


def test_a_task_that_was_run_in_part_ranks_nowhere(tmp_path):
    part = {"google_robot_open_top_drawer": (2, 4)}
    collected = scores.collect([(n, fake_run(tmp_path / n, part)) for n in
                            ("rt-1-x", "octo-base", "rt-2-x", "rt-1-begin")])  # fmt: skip
    shown = scores.text(collected, scores.read_real(""))
    assert "without google_robot_open_middle_drawer, google_robot_open_bottom_drawer" in shown
    assert "no MMRV" in shown


def test_a_score_shows_parts_below_their_task(tmp_path):
    per_task = {f"google_robot_open_{which}_drawer": (k, 10) for which, k in
                (("top", 1), ("middle", 2), ("bottom", 6))}  # fmt: skip
    folder = fake_run(tmp_path / "run", per_task, profile="official")
    lines = table(json.loads(Path(folder, "score.json").read_text())).splitlines()
    assert lines[0] == "visual_matching (official), google_robot"
    assert lines[1].split() == ["google_robot_open_drawer", "30.0%", "(9/30)"]
    assert lines[2].split() == ["google_robot_open_top_drawer", "10.0%", "(1/10)"]


def test_options_of_the_published_evaluation(tmp_path):
    settings = simulator.Settings(str(tmp_path))
    world = worlds("google_robot_open_top_drawer", "visual_matching")["None a0"]
    result = simulator.build_options(world, settings)
    assert result["shader_dir"] == "rt"
    assert result["rgb_overlay_cameras"] == ["overhead_camera"]
    assert result["rgb_overlay_path"].endswith("data/real_inpainting/open_drawer_a0.png")
    assert (result["control_freq"], result["sim_freq"]) == (3, 513)
    raster = simulator.build_options(world, simulator.Settings(str(tmp_path), drawn="raster"))
    assert "shader_dir" not in raster
    stack = simulator.build_options(worlds(STACK, "visual_matching")["base"], settings)
    assert (stack["robot"], stack["control_freq"], stack["sim_freq"]) == ("widowx", 5, 500)
    assert simulator.build_options(World("x", prepackaged=True), settings) == {
        "obs_mode": "rgbd",
        "prepackaged_config": True,
        "renderer_kwargs": {"offscreen_only": True},
    }


def test_options_of_a_start():
    result = simulator.reset_options(Start((0.3, 0.2, np.pi / 3), (0.1, 0.4)))
    assert np.allclose(result["robot_init_options"]["init_xy"], [0.3, 0.2])
    # Half a turn and then a sixth: (cos, sin of 30 degrees) times (0, 0, 0, 1).
    turn = result["robot_init_options"]["init_rot_quat"]
    assert np.allclose(turn, [-0.5, 0, 0, np.sqrt(0.75)])
    assert np.allclose(result["obj_init_options"]["init_xy"], [0.1, 0.4])
    assert simulator.reset_options(Start(episode=7)) == {"obj_init_options": {"episode_id": 7}}
    assert simulator.reset_options(Start(seed=7)) == {}


def test_settings_are_checked_all_at_once(tmp_path):
    with pytest.raises(simulator.SimulatorError, match=r"no ManiSkill2.*'watercolour'"):
        simulator.check(simulator.Settings(str(tmp_path), "", "watercolour"), ())
    with pytest.raises(simulator.SimulatorError, match="REAL2SIM"):
        simulator.check(simulator.Settings(""), ())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no ManiSkill2_real2sim source tree"),
        (["--tasks", "fly"], "no task fly"),
        (["--setting=variant_aggregation"], "no setting of widowx_stack_cube"),
        (["--profile=mine"], "invalid choice"),
    ],
)
def test_wrong_flags_are_one_clear_line(tmp_path, flags, words):
    command = [sys.executable, SCRIPT, "--server=ws://127.0.0.1:9", f"--out={tmp_path / 'run'}"]
    command += [f"--real2sim={tmp_path}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_rows_survive_workers(uri, tmp_path):
    make = functools.partial(make_env, PROFILES["official"])
    options = rollout.Options(uri, max_steps=200, workers=2, connect_timeout=10.0)
    episodes = make_trials(3)
    score = rollout.evaluate(make, episodes, str(tmp_path / "run"), options, {}, None, attempt)
    assert (score["episodes"], score["success_rate"]) == (3, 1)
    rows = results.load_rows(str(tmp_path / "run" / "episodes.jsonl"))
    assert sorted(row.more["start"][2] for row in rows) == [0, 8, 16]
    assert len({row.first_frame for row in rows}) == 3


def test_launch_evaluate_knows_it(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "simpler"]
    command += [f"--out={tmp_path / 'run'}", "--server=ws://127.0.0.1:9", "--", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--setting" in done.stdout
    assert "visual_matching (default)" in done.stdout
