import numpy as np
import pytest

from eval_servers import findings, sanity
from eval_servers.episode import ActionError, Episode
from tests.eval_servers.fake_env import FakeEnv

LOW, HIGH = [-0.1] * 6, [0.1, 0.1, 0.1, 0.1, 0.1, 0.3]
METADATA = {
    "cameras": {"primary": "observation/image", "wrist": "observation/wrist_image"},
    "chunk": 2,
    "gripper": {"closed": -1.0, "open": 1.0},
    "action": {"low": LOW, "high": HIGH, "gripper_open": 0.6},
}
EPISODES = [Episode(i, i, "up", text) for i, text in enumerate(["lift it", "drop it", "lift it"])]


class Robot(FakeEnv):
    gripper = {"closed": -1.0, "open": 1.0}  # noqa: RUF012
    arm_range = (-0.2, 0.3)


class Policy:
    """Sees the mean of each image, hears the length of its prompt, closes at every third step."""

    def __init__(self, metadata=METADATA, see=0.5, wrist=0.5, hear=0.1, scale=1.0, grip=None):
        self.metadata = metadata
        self.see, self.wrist, self.hear, self.scale, self.grip = see, wrist, hear, scale, grip
        self.steps = 0

    def reset(self):
        self.steps = 0

    def infer(self, obs):
        self.steps += 1
        observed = self.see * obs["observation/image"].mean() / 255 - 0.2
        observed += self.wrist * obs["observation/wrist_image"].mean() / 255
        unit = np.clip(observed + self.hear * (len(obs["prompt"]) - 5), -1, 1) * self.scale
        low, high = np.asarray(LOW), np.asarray(HIGH)
        actions = np.empty((2, 7), np.float32)
        actions[:, :6] = (unit + 1) / 2 * (high - low) + low
        actions[:, 6] = self.grip if self.grip is not None else (1 if self.steps % 3 else -1)
        return {"actions": actions}


EPISODES[1] = Episode(1, 1, "up", "drop it now")


def check(policy, env=None):
    result = sanity.check(env or Robot(), policy, EPISODES)
    return {finding.name: finding for finding in result}


def levels(found):
    return {name: finding.level for name, finding in found.items() if finding.level != "ok"}


def test_a_sound_policy_passes():
    result = check(Policy())
    assert levels(result) == {}
    assert set(result) == {
        "image",
        "instruction",
        "action range",
        "simulator's units",
        "gripper commands",
        "gripper polarity",
    }
    assert "move the action by 50 %" in result["image"].text


def test_a_policy_that_sees_nothing():
    result = check(Policy(see=0, wrist=0))
    assert levels(result) == {"image": "fail"}
    assert "camera names" in result["image"].advice
    assert levels(check(Policy(see=0.005, wrist=0.004))) == {"image": "warn"}


def test_one_dead_camera():
    result = check(Policy(wrist=0))
    assert levels(result) == {"cameras": "warn"}
    assert "observation/wrist_image" in result["cameras"].text


def test_a_policy_that_does_not_listen():
    result = check(Policy(hear=0))
    assert levels(result) == {"instruction": "fail"}
    assert "tokenizer" in result["instruction"].advice
    assert levels(check(Policy(hear=1e-4))) == {"instruction": "warn"}


def test_chance_does_not_pass_for_sight():
    class Noisy(Policy):
        calls = 0

        def infer(self, obs):
            reply = super().infer(obs)
            reply["actions"][:, :6] += 0.001 * (-1) ** self.calls
            self.calls += 1
            return reply

    assert levels(check(Noisy(see=0, wrist=0, hear=0))) == {"image": "fail", "instruction": "fail"}


@pytest.mark.parametrize(("scale", "level"), [(1.0, "ok"), (10.0, "fail"), (60.0, "fail")])
def test_actions_outside_their_statistics(scale, level):
    result = check(Policy(scale=scale, hear=0.13))["action range"]
    assert result.level == level
    if level == "fail":
        assert "un-normalized twice" in result.advice


def test_actions_stuck_at_the_ends():
    class Stuck(Policy):
        def infer(self, obs):
            reply = super().infer(obs)
            reply["actions"][:, :6] = np.where(reply["actions"][:, :6] > 0, HIGH, LOW)
            return reply

    result = check(Stuck(hear=0.05))["action range"]
    assert result.level == "fail"
    assert "outside [-1, 1]" in result.advice


@pytest.mark.parametrize(
    ("arm_range", "word"), [((-20.0, 20.0), "still normalized"), ((-0.01, 0.01), "twice")]
)
def test_units_of_another_simulator(arm_range, word):
    env = Robot()
    env.arm_range = arm_range
    result = check(Policy(), env)["simulator's units"]
    assert result.level == "fail"
    assert word in result.advice


def test_an_action_the_simulator_refuses():
    class Strict(Robot):
        def step(self, action):
            raise ActionError("seven numbers, please")

    result = check(Policy(), Strict())
    assert result["simulator's units"].level == "fail"
    assert "seven numbers" in result["simulator's units"].text
    assert result["gripper polarity"].level == "skip"


@pytest.mark.parametrize(
    ("closed", "opened", "word"), [(1.0, -1.0, "open where"), (0.0, 1.0, "not be understood")]
)
def test_gripper_commands_of_another_simulator(closed, opened, word):
    metadata = {**METADATA, "gripper": {"closed": closed, "open": opened}}
    result = check(Policy(metadata))["gripper commands"]
    assert result.level == "fail"
    assert word in result.advice


@pytest.mark.parametrize(
    ("grip", "recorded", "untrained", "level"),
    [
        (-1.0, 0.9, False, "fail"),
        (1.0, 0.2, False, "fail"),
        (1.0, 0.2, True, "warn"),
        (1.0, 0.9, False, "ok"),
        (-1.0, 0.5, False, "warn"),
        (1.0, 0.35, False, "warn"),
        (1.0, 0.5, False, "ok"),
        (None, 0.9, False, "ok"),
        (1.0, None, False, "skip"),
    ],
)
def test_gripper_polarity_against_the_datas_statistics(grip, recorded, untrained, level):
    action = {**METADATA["action"], "gripper_open": recorded}
    metadata = {**METADATA, "action": action, "untrained": untrained}
    assert check(Policy(metadata, grip=grip))["gripper polarity"].level == level


def test_polarity_counts_an_inverted_command_pair():
    metadata = {**METADATA, "gripper": {"closed": 1.0, "open": 0.0}}
    assert check(Policy(metadata, grip=1.0))["gripper polarity"].level == "fail"
    assert check(Policy(metadata, grip=0.0))["gripper polarity"].level == "ok"


def test_a_server_that_says_little_is_asked_what_can_be_asked():
    result = check(Policy({}), FakeEnv())
    assert {n for n, f in result.items() if f.level == "skip"} == {
        "action range",
        "simulator's units",
        "gripper commands",
        "gripper polarity",
    }
    assert result["image"].level == result["instruction"].level == "ok"
    assert levels(check(Policy({}, see=0, wrist=0), FakeEnv()))["image"] == "fail"


@pytest.mark.parametrize(("hear", "level"), [(0.1, "ok"), (1e-4, "ok"), (0, "warn")])
def test_one_instruction_alone_is_set_against_a_made_up_one(hear, level):
    results = {f.name: f for f in sanity.check(Robot(), Policy(hear=hear), EPISODES[:1])}
    assert results["instruction"].level == level
    assert "made-up" in results["instruction"].text


def test_an_instruction_that_only_the_simulator_knows():
    class Knowing(Robot):
        def told(self, episode):
            return "open drawer"

    class Listening(Policy):
        heard = set()  # noqa: RUF012

        def infer(self, obs):
            self.heard.add(obs["prompt"])
            return super().infer(obs)

    blank = [Episode(i, i, "up", "") for i in range(3)]
    assert levels({f.name: f for f in sanity.check(Knowing(), Listening(), blank)}) == {}
    assert Listening.heard == {"open drawer", sanity.MADE_UP}


@pytest.mark.parametrize(("untrained", "level"), [(False, "fail"), (True, "warn")])
def test_actions_unnormalized_twice_where_that_makes_them_small(untrained, level):
    class Twice(Policy):
        def infer(self, obs):
            reply = super().infer(obs)
            low, high = np.asarray(LOW), np.asarray(HIGH)
            reply["actions"][:, :6] = (reply["actions"][:, :6] + 1) / 2 * (high - low) + low
            return reply

    result = check(Twice({**METADATA, "untrained": untrained}))["action range"]
    assert result.level == level
    assert "un-normalized twice" in result.advice


def test_lines_say_what_to_do():
    results = [findings.Finding("a", "ok", "fine"), findings.Finding("b", "fail", "bad", "do this")]
    assert findings.worst(results) == "fail"
    assert findings.worst([]) == "ok"
    assert [line.split() for line in findings.lines(results)] == [
        ["ok", "a", "fine"], ["fail", "b", "bad"], ["->", "do", "this"]
    ]  # fmt: skip
    assert "\x1b[31mfail" in findings.lines(results, colour=True)[1]
