"""Episodes of clients that say nothing, on what LIBERO shows and on what robots do meanwhile."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.inference.test_policy import make
from tests.serve.clients import ask, connect
from tests.serve.clients import obs as said
from tests.serve.fakes import CountingPolicy
from vla_jax.inference.protocol import STATE_KEY
from vla_jax.serve import server
from vla_jax.serve.episodes import Course, Episodes, View, view
from vla_jax.serve.options import ServerOptions

PICTURES = ("observation/image", "observation/wrist_image")
PACE = 0.15  # seconds for five control steps
RESET = 3.0


def recorded():
    """The fixture's episodes: lists of observations."""
    file = Path(__file__).parents[1] / "fixtures/libero_episodes/requests.npz"
    with np.load(file) as data:
        arrays = dict(data)
    episodes = []
    for number in range(8):
        rows = np.flatnonzero(arrays["episode"] == number)
        observations = []
        for row in rows:
            small = {f"observation/{k}": arrays[k][row] for k in ("image", "wrist_image")}
            images = {key: np.repeat(x[:, :, None], 3, axis=2) for key, x in small.items()}
            observations.append({**images, STATE_KEY: arrays["state"][row], "prompt": "go"})
        episodes.append(observations)
    return episodes


@pytest.fixture(scope="module")
def episodes():
    return recorded()


def without(obs, *keys):
    return {key: value for key, value in obs.items() if key not in keys}


def begun(requests, rule=None, course=None):
    """Numbers of the requests at which an episode begins; each is (observation, pause)."""
    rule, course = rule or Episodes(), course or Course()
    return [i for i, (obs, pause) in enumerate(requests) if rule.begins(course, obs, None, pause)]


def as_sent(episodes, pace=PACE, reset=RESET, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    requests = []
    for number, observations in enumerate(episodes):
        for i, obs in enumerate(observations):
            pause = pace * rng.uniform(1, 1 + noise) if i else (reset if number else np.inf)
            requests.append((obs, pause))
    return requests


def firsts(episodes):
    return [0, *itertools.accumulate(len(observations) for observations in episodes[:-1])]


@pytest.mark.parametrize(("pace", "reset", "noise"), [(0.15, 3.0, 1.0), (1.3, 6.6, 0.3)])
@pytest.mark.parametrize("left_out", [(), (STATE_KEY,)])
def test_openpis_loop_gets_fresh_episodes(episodes, pace, reset, noise, left_out):
    """By state, and by pictures without it; the last change, of a still robot, is not seen."""
    sent = [[without(obs, *left_out) for obs in single] for single in episodes]
    result = begun(as_sent(sent, pace, reset, noise))
    assert result == firsts(episodes)[:7]


def test_a_single_camera_is_enough_for_a_robot_that_acts(episodes):
    sent = [[without(obs, STATE_KEY, PICTURES[1]) for obs in single] for single in episodes[:3]]
    assert begun(as_sent(sent)) == firsts(sent)


@pytest.mark.parametrize("left_out", [(), (STATE_KEY,)])
def test_pauses_inside_an_episode_change_nothing(episodes, left_out):
    """Wherever the network stalls or somebody stops the robot, and however often."""
    for observations in episodes:
        sent = [without(obs, *left_out) for obs in observations]
        for stalled in range(1, len(sent)):
            pauses = [PACE] * len(sent)
            pauses[0], pauses[stalled] = np.inf, 60.0
            assert begun(zip(sent, pauses, strict=True)) == [0]
        assert begun((obs, 60.0 if i % 4 == 3 else PACE) for i, obs in enumerate(sent)) == [0]


def test_a_slow_robot_and_one_that_waits(episodes):
    slow = as_sent(episodes[:1], pace=20.0)
    assert begun(slow) == [0]
    waiting = [*slow, *[(slow[-1][0], 20.0)] * 10, (slow[-1][0], 600.0), *slow[-1:]]
    assert begun(waiting) == [0]


def test_chunks_of_other_lengths(episodes):
    """A request every 5, 10 or 20 control steps."""
    for stride in (1, 2, 4):
        sent = [single[::stride] for single in episodes[:3]]
        assert begun(as_sent(sent)) == firsts(sent)


def test_a_robot_that_drives_home_within_its_episode(episodes):
    present = episodes[0]
    back = [*present, *present[::-1]]
    assert begun((obs, PACE) for obs in back) == [0]
    paused = [(obs, 30.0 if i == len(back) - 1 else PACE) for i, obs in enumerate(back)]
    assert begun(paused) == [0]


def test_a_return_without_a_pause_is_none(episodes):
    assert begun(as_sent(episodes[:2], reset=PACE)) == [0]


def test_who_speaks_is_believed(episodes):
    """A client that has named an episode, or reset once, is never guessed about."""
    rule, course = Episodes(), Course()
    requests = as_sent(episodes[:2])
    names = ["a"] * len(requests)
    results = [
        i
        for i, ((obs, pause), name) in enumerate(zip(requests, names, strict=True))
        if rule.begins(course, obs, name, pause)
    ]
    assert results == [0]
    assert rule.begins(course, requests[0][0], "b", PACE)
    assert rule.begins(course, requests[0][0] | {"prompt": "stop"}, "b", PACE)
    silent = Course(says=True)
    assert begun(requests, course=silent) == [0]


def test_seconds_and_off(episodes):
    requests = as_sent(episodes[:2])
    assert begun(requests, Episodes("off")) == [0]
    assert begun(requests, Episodes("2.5")) == firsts(episodes[:2])
    same = [(episodes[0][0], 0.1)] * 3 + [(episodes[0][0], 2.0)]
    assert begun(same, Episodes("1.5")) == [0, 3]
    assert Episodes("1.5").to_json()["silent_clients"] == "1.5 s without a request"
    assert Episodes("off").to_json()["silent_clients"] == "nothing"
    for bad in ("never", "-1", "0", "nan", "inf"):
        with pytest.raises(ValueError, match="neither auto, off nor a number"):
            ServerOptions(new_episode=bad)


def test_what_cannot_be_known_is_said_once(episodes, caplog):
    still = as_sent(episodes[6:])
    begun(still, Episodes(remembers=False))
    assert not caplog.records
    begun(still + still, Episodes(remembers=True))
    assert ["says nothing of episodes" in r.message for r in caplog.records] == [True]


def test_the_second_episode_starts_like_the_first_over_one_connection(episodes):
    """A policy with a window, asked as openpi's loop asks: nothing but observations and time."""
    changes: Any = {"structure.window": 4}
    policy = make(**changes)
    with server.background(policy, ServerOptions(port=0)) as uri:
        with connect(uri) as ws:
            ws.recv()
            replies = []
            for observations in episodes[:2]:
                for obs in observations:
                    replies.append(ask(ws, {**obs, "prompt": "lift the red block"})["actions"])
                    time.sleep(0.01)
                time.sleep(0.6)
        second = replies[len(episodes[0])]
        with connect(uri) as ws:
            ws.recv()
            fresh = ask(ws, {**episodes[1][0], "prompt": "lift the red block"})["actions"]
    np.testing.assert_allclose(second, fresh, atol=1e-6)
    # The history matters: without the rule the same observation gets other actions.
    options = ServerOptions(port=0, new_episode="off")
    with server.background(policy, options) as uri, connect(uri) as ws:
        ws.recv()
        for obs in [*episodes[0][-3:], episodes[1][0]]:
            spoilt = ask(ws, {**obs, "prompt": "lift the red block"})["actions"]
    assert np.abs(spoilt - fresh).max() > 1e-3


def test_what_clients_say_reaches_the_policy():
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri, connect(uri) as ws:
        ws.recv()

        def steps(count, **changes):
            return [int(ask(ws, said(**changes))["actions"][0, 1]) for _ in range(count)]

        assert steps(2) == [1, 2]
        for word in ("episode_end", "episode_start", "reset"):
            assert ask(ws, {"__ctrl__": word}) == {}
            assert steps(2) == [1, 2]
        for key in ("episode_id", "session_id"):
            assert steps(2, **{key: "a"}) == [1, 2]
            assert steps(1, **{key: np.array([7])}) == [1]
            assert steps(1, **{key: 7}) == [2]
        assert ask(ws, {"__ctrl__": "stop"}).startswith("__ctrl__ 'stop': legal: ['episode_start'")
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri, connect(uri) as ws:
        ws.recv()
        assert "episode_id: expected a text" in ask(ws, said(episode_id={"a": 1}))


def test_whatever_stands_in_an_observation():
    values = [None, 3, "x", b"x", [1, 2], {}, np.zeros((0, 0, 3), np.uint8), np.array(["a"])]
    values += [np.array([np.nan, 1]), np.zeros((9, 9), np.uint8), np.zeros(5, complex)]
    rule, course = Episodes(), Course()
    for value in values:
        for key in (STATE_KEY, *PICTURES, "prompt"):
            rule.begins(course, {key: value}, None, 1.0)
        assert view({STATE_KEY: value, PICTURES[0]: value}) is None
    # Another size, or another kind of evidence, in the middle of an episode.
    for state in (np.zeros(3), np.zeros(8), np.zeros(0)):
        rule.begins(course, {STATE_KEY: state}, None, 1.0)
    shown = view({PICTURES[0]: np.full((16, 16, 3), 9, np.uint8)})
    assert isinstance(shown, View)
    assert shown.values.tolist() == [9.0] * 64
