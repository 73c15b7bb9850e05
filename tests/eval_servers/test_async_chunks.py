"""The next chunk is asked for while the last one is executed."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from eval_servers.async_chunks import AsyncChunks, Overlap, blend
from eval_servers.episode import Episode, jerk, run_episode
from tests.eval_servers.fake_env import FakeEnv

CHUNK = 10
OVERLAP = Overlap("plain", 2)
RTC = {"guidance": "jacobian", "executed": "rtc/executed", "delay": "rtc/delay"}


class FakeClient:
    """A policy whose action says for which control step it is meant, and in which answer."""

    def __init__(self, rtc: Any = None, offset: float = 0.0, chunk: int = CHUNK) -> None:
        self.metadata: dict = {"chunk": chunk}
        if rtc is not None:
            self.metadata["rtc"] = rtc
        self.offset, self.requests = offset, []
        self.pause = 0.0

    def infer(self, obs: dict) -> dict:
        time.sleep(self.pause)
        number = len(self.requests)
        self.requests.append(obs)
        steps = obs["step"] + np.arange(self.metadata["chunk"], dtype=np.float32)
        actions = np.stack([steps + number * self.offset, np.full(len(steps), number)], axis=1)
        return {"actions": actions.astype(np.float32), "server_timing": {"infer_ms": 1.0}}


def run(chunks: AsyncChunks, steps: int) -> np.ndarray:
    actions = np.array([chunks.act(lambda i=i: {"step": i}) for i in range(steps)])
    chunks.reset()  # a request that is on its way has then arrived
    return actions


@pytest.mark.parametrize("delay", [0, 2, 4])
def test_every_action_is_the_one_meant_for_its_step(delay):
    client = FakeClient()
    chunks = AsyncChunks(client, execute_steps=5, mode="plain", delay=delay)
    actions = run(chunks, 23)
    np.testing.assert_array_equal(actions[:, 0], np.arange(23))
    # Requests leave every 5 steps, and each answer takes over `delay` steps after.
    expected = [max(0, (i - delay) // 5) for i in range(23)]
    np.testing.assert_array_equal(actions[:, 1], expected)
    assert [obs["step"] for obs in client.requests] == [0, 5, 10, 15, 20]
    assert chunks.delays == [delay] * len(chunks.delays)
    assert chunks.waited == chunks.bounded == 0
    assert len(chunks.server_ms) == len(chunks.round_trip_ms) == len(chunks.delays) + 1


def test_a_server_that_guides_is_told_what_is_executed():
    client = FakeClient(RTC)
    run(AsyncChunks(client, execute_steps=4, delay=3), 10)
    assert [(x.get("rtc/executed"), x.get("rtc/delay")) for x in client.requests] == [
        (None, None),  # an episode's first chunk follows none
        (4, 3),
        (4, 3),
    ]


def test_other_chunks_are_blended():
    client = FakeClient({**RTC, "guidance": None, "max_step": [0.0, 0.0]}, offset=100.0)
    del client.metadata["rtc"]["max_step"]
    actions = run(AsyncChunks(client, execute_steps=4, delay=2), 10)
    # Answer 1 counts from step 4 and takes over at step 6; six actions were left of the first
    # chunk then, four of them behind the delay, so that its share falls in fifths.
    shares = (actions[:, 0] - np.arange(10)) / 100.0
    np.testing.assert_allclose(shares, [0] * 6 + [0.2, 0.4, 0.6, 0.8], atol=1e-5)


def test_commands_are_not_halved():
    old, new = np.zeros((4, 2)), np.ones((6, 2))
    mixed = blend(old, new, delay=1, max_step=np.array([1.0, 0.0]))
    np.testing.assert_allclose(mixed[:, 0], [0, 0.25, 0.5, 0.75, 1, 1])
    # The second number is a gripper's: old while the old chunk weighs more.
    np.testing.assert_array_equal(mixed[:, 1], [0, 0, 1, 1, 1, 1])


def test_a_delay_that_was_not_foreseen_does_not_make_the_arm_jump(caplog):
    # The server holds chunks to each other only as far as it was told: here not at all.
    rtc = {**RTC, "max_step": [2.0, 0.0]}
    client = FakeClient(rtc, offset=30.0)
    chunks = AsyncChunks(client, execute_steps=5, delay=4)
    actions = run(chunks, 12)
    steps = np.abs(np.diff(actions[:, 0]))
    assert steps.max() <= 2.0 + 1e-5
    assert chunks.bounded == 3  # steps 9, 10 and 11 were still on their way
    assert sum("bounded steps" in x.message for x in caplog.records) == 1
    # Without a bound the same answers jump.
    jumps = np.abs(np.diff(run(AsyncChunks(FakeClient(offset=30.0), 5, "plain", 4), 12)[:, 0]))
    assert jumps.max() > 30.0


def test_on_a_robot_the_delay_is_measured():
    client = FakeClient(RTC)
    chunks = AsyncChunks(client, execute_steps=3)
    answered = threading.Event()
    original = client.infer

    def slow(obs: dict) -> dict:
        # Every answer but the first comes when the robot has moved on.
        if obs["step"]:
            answered.wait(10)
            answered.clear()
        return original(obs)

    client.infer = slow  # type: ignore[method-assign]
    actions = []
    for step in range(12):
        actions.append(chunks.act(lambda step=step: {"step": step}))
        if step in (4, 9):  # a request left at step 3, and one as soon as it was due after
            answered.set()
            while chunks._request is not None and not chunks._request.answer.done():
                time.sleep(0.001)
    np.testing.assert_array_equal(np.array(actions)[:, 0], np.arange(12))
    assert chunks.delays == [2, 4]
    # The second request could only expect what the first had taken.
    assert [x.get("rtc/delay") for x in client.requests] == [None, 0, 2]


def test_a_robot_without_actions_waits_and_says_so(caplog):
    client = FakeClient(chunk=4)
    chunks = AsyncChunks(client, execute_steps=2)
    client.pause = 0.05
    actions = run(chunks, 9)
    np.testing.assert_array_equal(actions[:, 0], np.arange(9))
    assert chunks.waited > 0
    assert sum("the robot waits" in x.message for x in caplog.records) == 1


def test_a_new_episode_forgets_the_answer_to_come():
    client = FakeClient()
    chunks = AsyncChunks(client, execute_steps=3, mode="plain", delay=2)
    run(chunks, 4)
    chunks.reset()
    np.testing.assert_array_equal(run(chunks, 4)[:, 0], np.arange(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode 'fast' is none of"),
        ({"execute_steps": 8, "delay": 3}, "do not fit the policy's chunk of 10"),
        ({"execute_steps": 2, "delay": 3}, "a delay of 3 steps is not within 0..2"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    options: dict[str, Any] = {"execute_steps": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        AsyncChunks(FakeClient(), **options)


def test_jerk_of_commands():
    commands = [np.array([x, 0.0, grip]) for x, grip in ((0, 1), (1, -1), (4, 1), (9, -1))]
    # Second differences 2 and 2; the gripper's jumps do not count.
    assert jerk(commands, gripper=True) == 2.0
    assert jerk(commands, gripper=False) == pytest.approx(np.hypot(2, 4))
    assert jerk(commands[:2], gripper=True) is None


class Server(FakeClient):
    """With what an episode needs of a client."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata |= {"cameras": {}, "gripper": {"closed": -1, "open": 1}}
        self.control_step, self.busy = 0, False

    def reset(self) -> None:
        # One connection takes one request at a time.
        assert not self.busy
        self.control_step = 0

    def infer(self, obs: dict) -> dict:
        self.busy = True
        reply = super().infer({"step": 0})
        self.busy = False
        actions = np.zeros((len(reply["actions"]), 7), np.float32)
        actions[:, 6] = 1
        return {"actions": actions}


def test_an_episode_with_an_overlap_asks_as_often_and_says_how_smooth_it_was():
    episode = Episode(0, 1, "down", "do it")  # a task that is never solved
    client, waiting = Server(), Server()
    row = run_episode(FakeEnv(), client, episode, 9, 3, overlap=Overlap("plain", 2))
    again = run_episode(FakeEnv(), waiting, episode, 9, 3)
    assert (row.success, row.steps) == (again.success, again.steps)
    assert row.jerk == again.jerk == 0.0
    assert row.to_json()["jerk"] == 0.0


def test_a_request_is_not_left_on_its_way_when_an_episode_ends():
    client = Server()
    client.pause = 0.05
    for steps in (4, 4):  # the second request leaves with the last action but one
        run_episode(FakeEnv(), client, Episode(0, 1, "down", "do"), steps, 3, None, None, OVERLAP)
        assert not client.busy
