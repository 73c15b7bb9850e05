import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_servers import results, rollout
from eval_servers.tabletop import tasks
from eval_servers.tabletop.expert import Expert
from eval_servers.tabletop.rollout import TabletopRollout, make_episodes
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]


class OpenHand(CountingPolicy):
    """Stays where it is with the gripper open (+1), or sends a gripper command of 0."""

    def __init__(self, gripper=1.0):
        super().__init__()
        self.gripper = gripper
        self.prompts = set()
        cameras = {"primary": "observation/image", "wrist": "observation/wrist_image"}
        self.metadata = {**self.metadata, "cameras": cameras}

    def infer(self, session, obs):
        self.prompts.add(obs["prompt"])
        assert obs["observation/wrist_image"].shape == (32, 32, 3)
        assert set(obs) == {"observation/image", "observation/wrist_image", "prompt"}
        reply, session = super().infer(session, obs)
        actions = np.zeros_like(reply["actions"])
        actions[:, 6] = self.gripper
        return {"actions": actions}, session


def run(policy, out, *flags):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        script = str(ROOT / "eval_servers" / "tabletop" / "rollout.py")
        command = [sys.executable, script, f"--server={uri}", f"--out={out}", "--image-size=32"]
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=120, cwd=out.parent
        )


def test_episodes_go_round_the_tasks_with_unseen_seeds():
    episodes = make_episodes(tasks.TASKS, 2 * len(tasks.TASKS) + 1, 10000, False)
    assert [e.task for e in episodes] == [*tasks.TASKS, *tasks.TASKS, tasks.TASKS[0]]
    assert [e.seed for e in episodes] == list(range(10000, 10000 + len(episodes)))
    assert all(e.instruction == tasks.instruction(e.task) for e in episodes)


def test_swapped_instructions_are_other_tasks_ones():
    separate = make_episodes(tasks.TASKS, 30, 10000, False)
    swapped = make_episodes(tasks.TASKS, 30, 10000, True)
    for a, b in zip(separate, swapped, strict=True):
        assert (a.index, a.seed, a.task) == (b.index, b.seed, b.task)
        assert a.instruction != b.instruction
    assert {e.instruction for e in swapped} == {e.instruction for e in separate}


@pytest.mark.parametrize("task", ["lift_red_block", "turn_off_led"])
def test_the_adapter_judges_the_episodes_task(task):
    env = TabletopRollout(image_size=32)
    obs = env.reset(rollout.Episode(0, 10000, task, ""))
    assert obs["observation/image"].dtype == np.uint8
    assert obs["observation/state"].dtype == np.float32
    assert not env.success()
    expert = Expert(task)
    for _ in range(tasks.HORIZON):
        env.step(expert.act(env._env))
        if env.success():
            break
    assert env.success()
    env.reset(rollout.Episode(1, 10001, task, ""))
    assert not env.success()


def test_the_script_end_to_end_with_swapped_instructions(tmp_path):
    policy, out = OpenHand(), tmp_path / "run"
    chosen = ["lift_red_block", "turn_on_led"]
    flags = ["--episodes=4", "--workers=2", "--max-steps=3", "--swap-instructions", "--tasks"]
    done = run(policy, out, *flags, *chosen)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("success 0.0 % (0/4")
    assert "[4/4]" in done.stderr
    score = json.loads((out / "score.json").read_text())
    assert sorted(score["per_task"]) == sorted(chosen)
    assert score["protocol"]["swap_instructions"] is True
    rows = results.load_rows(str(out / "episodes.jsonl"))
    assert {(r.task, r.instruction) for r in rows} == {
        ("lift_red_block", "turn on the light"),
        ("turn_on_led", "lift the red block"),
    }
    assert policy.prompts == {"turn on the light", "lift the red block"}
    assert sum(r.video is not None for r in rows) == 2
    assert len(list((out / "videos").glob("*.webp"))) == 2


def test_an_action_that_does_not_fit_is_one_clear_line(tmp_path):
    done = run(OpenHand(gripper=0.0), tmp_path / "run", "--episodes=2", "--workers=1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("rollout: the policy does not fit")
    assert "gripper" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_is_one_clear_line(tmp_path):
    script = str(ROOT / "eval_servers" / "tabletop" / "rollout.py")
    flags = ["--server=ws://127.0.0.1:9", "--connect-timeout=0.2", f"--out={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("rollout: no policy server at ws://127.0.0.1:9")
    assert not (tmp_path / "run").exists()
