"""vla-eval's wire, on messages that its harness 0.8.0 sends (written as its codec writes them)."""

import io
import time

import msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from tests.serve.clients import connect
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server
from vla_jax.serve.transports.vla_eval import MAX_PIXELS

PICTURE = np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)


def image(array, form="PNG"):
    """As its image codec: PNG by default."""
    if form == "raw":
        data, dtype = array.tobytes(), array.dtype.str
        return {
            "__image__": True,
            "format": "raw",
            "data": data,
            "dtype": dtype,
            "shape": [9, 12, 3],
        }
    file = io.BytesIO()
    Image.fromarray(array).save(file, format=form)
    return {"__image__": True, "format": form.lower(), "data": file.getvalue(), "shape": [9, 12, 3]}


def array(values):
    values = np.asarray(values)
    data, dtype = values.tobytes(), values.dtype.str
    return {"__ndarray__": True, "data": data, "dtype": dtype, "shape": list(values.shape)}


def observation(**changes):
    return {
        "images": {"agentview": image(PICTURE), "wrist": image(PICTURE // 2)},
        "task_description": "go",
        "states": array(np.arange(8.0)),
        **changes,
    }


class Harness:
    def __init__(self, ws):
        self.ws, self.seq = ws, 0

    def send(self, kind, payload):
        self.seq += 1
        envelope = {"type": kind, "payload": payload, "seq": self.seq, "timestamp": time.time()}
        self.ws.send(msgpack.packb(envelope))

    def ask(self, kind, payload):
        self.send(kind, payload)
        return msgpack.unpackb(self.ws.recv(timeout=10))


class Seeing(CountingPolicy):
    """Keeps what it is asked about."""

    def __init__(self):
        super().__init__()
        self.metadata |= {
            "cameras": {"primary": "observation/image", "wrist": "observation/wrist_image"},
            "needs_proprio": True,
            "gripper": {"closed": 1.0, "open": -1.0},
        }
        self.seen = []

    def infer(self, session, obs):
        self.seen.append(obs)
        return super().infer(session, obs)


@pytest.fixture
def policy():
    return Seeing()


@pytest.fixture
def harness(policy):
    options = server.ServerOptions(port=0)
    with server.background(policy, options) as uri, connect(uri + "/vla-eval") as ws:
        yield Harness(ws)


def test_its_harness_is_told_what_to_send(harness):
    reply = harness.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})
    assert (reply["type"], reply["seq"]) == ("hello", 1)
    assert reply["payload"]["protocol_version"] == 1
    assert reply["payload"]["observation_params"] == {"send_wrist_image": True, "send_state": True}
    assert reply["payload"]["action_spec"]["gripper"]["format"] == "binary_close_positive"


def test_two_episodes_of_its_harness(harness, policy):
    harness.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})
    for _ in range(2):
        harness.send("episode_start", {"task": {"name": "go", "suite": "libero_object"}})
        for step in (1, 2, 3):
            reply = harness.ask("observation", observation())
            assert (reply["type"], reply["seq"]) == ("action", harness.seq)
            actions = reply["payload"]["actions"]
            assert (actions["dtype"], actions["shape"]) == ("<f4", [7])
            assert np.frombuffer(actions["data"], "<f4")[1] == step
        harness.send("episode_end", {"metrics": {"success": False}})
    observed = policy.seen[0]
    np.testing.assert_array_equal(observed["observation/image"], PICTURE)
    np.testing.assert_array_equal(observed["observation/wrist_image"], PICTURE // 2)
    assert observed["observation/state"].tolist() == list(range(8))
    assert observed["prompt"] == "go"


@pytest.mark.parametrize("form", ["raw", "JPEG"])
def test_other_forms_of_images(harness, policy, form):
    harness.ask("observation", observation(images={"front": image(PICTURE, form)}))
    assert policy.seen[0]["observation/image"].shape == (9, 12, 3)


def bomb():
    file = io.BytesIO()
    Image.new("1", (4096, MAX_PIXELS // 4096 + 1)).save(file, format="PNG")
    return {"__image__": True, "format": "png", "data": file.getvalue(), "shape": []}


BAD = {
    "no envelope": ({"prompt": "go"}, "expected a map with"),
    "type": ({"type": "act"}, "type 'act': expected hello"),
    "payload": ({"payload": 3}, "payload: expected a map"),
    "no image": ({"payload": {"task_description": "go"}}, "observation/image: missing"),
    "a bomb": ({"payload": observation(images={"a": bomb()})}, "'images.a': images of more than"),
    "a GIF": (
        {"payload": observation(images={"a": image(PICTURE, "GIF")})},
        "'images.a': neither PNG nor JPEG",
    ),
    "half a PNG": (
        {
            "payload": observation(
                images={"a": image(PICTURE) | {"data": image(PICTURE)["data"][:60]}}
            )
        },
        "'images.a': neither PNG nor JPEG",
    ),
    "objects": (
        {"payload": observation(states=array(np.arange(3)) | {"dtype": "|O"})},
        "'states': dtype '|O'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_mean_is_an_error_of_its_own_kind(harness, name):
    changes, reason = BAD[name]
    good = {"type": "observation", "payload": {}, "seq": 5, "timestamp": 0.0}
    harness.ws.send(msgpack.packb(changes if name == "no envelope" else good | changes))
    reply = msgpack.unpackb(harness.ws.recv(timeout=10))
    assert reply["type"] == "error"
    assert reason in reply["payload"]["error"]
    with pytest.raises(ConnectionClosed):
        harness.ws.recv(timeout=5)


def test_a_simulator_that_holds_up_its_event_loop_keeps_its_connection():
    options = server.ServerOptions(port=0, ping_interval=0.1, ping_timeout=0.1)
    with server.background(Seeing(), options) as uri, connect(uri + "/vla-eval") as ws:
        with ws.protocol_mutex:  # nothing is read or answered meanwhile
            time.sleep(0.8)
        assert Harness(ws).ask("observation", observation())["type"] == "action"
