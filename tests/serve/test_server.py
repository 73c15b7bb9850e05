import concurrent.futures
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.serve.clients import IMAGE, ask, close_code, connect, get, obs
from tests.serve.fakes import CHUNK, CountingPolicy
from vla_jax.serve import msgpack_numpy, server


@pytest.fixture
def policy():
    return CountingPolicy(fail_on="crash")


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0, max_message_bytes=2**20)) as uri:
        yield uri


def test_metadata_then_actions(uri, policy):
    with connect(uri) as ws:
        metadata: Any = msgpack_numpy.unpack(ws.recv())
        assert "3 times as long as usual" in metadata.pop("episodes")["silent_clients"]
        assert "check" in metadata.pop("endpoints")
        assert metadata == policy.metadata
        first, second = ask(ws, obs()), ask(ws, obs())
    assert first["actions"].shape == (CHUNK, 7)
    assert first["actions"].dtype == np.float32
    assert first["actions"][0, :4].tolist() == [1, 1, 0, 7]
    assert second["actions"][0, 1] == 2
    assert first["server_timing"]["infer_ms"] >= 0
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0
    assert policy.threads == {"policy_0"}


def test_compiled_before_the_port_is_bound():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bound_during_warmup = []

    class Probe(CountingPolicy):
        def warmup(self):
            with socket.socket() as probe:
                bound_during_warmup.append(probe.connect_ex(("127.0.0.1", port)) == 0)
            super().warmup()

    policy = Probe()
    with server.background(policy, server.ServerOptions(port=port)) as uri:
        assert policy.warm
        assert uri == f"ws://127.0.0.1:{port}"
    assert bound_during_warmup == [False]


def test_errors_of_warmup_and_binding_reach_the_caller(uri):
    class Broken(CountingPolicy):
        def warmup(self):
            raise RuntimeError("out of memory")

    with (
        pytest.raises(RuntimeError, match="out of memory"),
        server.background(Broken(), server.ServerOptions(port=0)),
    ):
        pass
    port = urlsplit(uri).port
    assert port is not None
    with pytest.raises(OSError, match="in use"):
        server.check_port("127.0.0.1", port)
    with (
        pytest.raises(OSError, match="in use"),
        server.background(CountingPolicy(), server.ServerOptions(port=port)),
    ):
        pass


BAD = {
    "garbage": (b"\xc1garbage", ["msgpack"]),
    "text frame": ("hello", ["binary frame"]),
    "truncated": (msgpack_numpy.pack(obs())[:-20], ["msgpack"]),
    "not a map": (msgpack_numpy.pack([1, 2]), ["map", "list"]),
    "bytes keys": (msgpack_numpy.pack({b"prompt": "x"}), ["string keys", "prompt"]),
    "empty map": (msgpack_numpy.pack({}), ["image: missing", "prompt: missing", "legal keys"]),
    "wrong shape": (msgpack_numpy.pack(obs(**{"observation/image": IMAGE[0]})), ["(8, 3)"]),
    "wrong dtype": (msgpack_numpy.pack(obs(**{"observation/image": IMAGE / 255})), ["float64"]),
    "array prompt": (msgpack_numpy.pack(obs(prompt=np.zeros(2))), ["prompt: missing"]),
    "endpoint": (msgpack_numpy.pack(obs(endpoint="step")), ["'step'", "infer", "reset"]),
    "text array": (
        msgpack.packb(
            {"a": {"b": {b"__ndarray__": True, b"data": b"", b"dtype": "<U1", b"shape": [0]}}}
        ),
        ["'a.b': dtype '<U1' is not bool"],
    ),
    "array endpoint": (msgpack_numpy.pack(obs(endpoint=np.zeros(2))), ["infer", "reset"]),
    "list endpoint": (msgpack_numpy.pack(obs(endpoint=["infer"])), ["infer", "reset"]),
    "huge": (
        msgpack_numpy.pack(obs(image=np.zeros(2**20 + 1, np.uint8))),
        ["too large", "1048576"],
    ),
    "huge text": ("x" * (2**20 + 1), ["too large"]),
    "policy bug": (msgpack_numpy.pack(obs("crash now")), ["ArithmeticError", "told to fail"]),
    "not finite": (msgpack_numpy.pack(obs("nan")), ["finite"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_ends_only_its_own_connection(uri, name):
    request, reasons = BAD[name]
    with connect(uri) as good, connect(uri) as bad:
        for ws in (good, bad):
            ws.recv()
        ask(good, obs())
        message = ask(bad, request)
        assert isinstance(message, str)
        assert all(reason in message for reason in reasons), message
        assert "\n" not in message
        with pytest.raises(ConnectionClosed) as closed:
            bad.recv(timeout=5)
        assert close_code(closed) == (1009 if "huge" in name else 1011)
        close: Any = closed.value.rcvd
        assert "huge" in name or message.startswith(close.reason.removesuffix("..."))
        assert ask(good, obs())["actions"][0, 1] == 2


def test_concurrent_sessions_do_not_mix(uri):
    barrier = threading.Barrier(8)

    def client(_):
        recorded = []
        with connect(uri) as ws:
            ws.recv()
            barrier.wait()
            for _ in range(25):
                recorded.append(tuple(ask(ws, obs())["actions"][0, :2].astype(int)))
        return recorded

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        histories = list(pool.map(client, range(8)))
    assert len({history[0][0] for history in histories}) == 8
    for history in histories:
        assert history == [(history[0][0], step) for step in range(1, 26)]


def test_reset_and_a_new_prompt_start_a_new_history(uri):
    with connect(uri) as ws:
        ws.recv()
        assert ask(ws, {"endpoint": "reset"}) == "reset successful"
        steps = [ask(ws, obs("a"))["actions"][0, 1] for _ in range(3)]
        assert ask(ws, {"endpoint": "reset", "session_id": "x"}) == "reset successful"
        steps += [ask(ws, obs("a", endpoint="infer"))["actions"][0, 1] for _ in range(2)]
        steps += [ask(ws, obs("b"))["actions"][0, 1] for _ in range(2)]
        steps += [ask(ws, obs("a"))["actions"][0, 1]]
    assert steps == [1, 2, 3, 1, 2, 1, 2, 1]


def test_healthz(uri):
    assert get(uri, "/healthz") == (200, b"OK\n")


def test_keep_alive_and_health_survive_a_blocking_inference():
    options = server.ServerOptions(port=0, ping_interval=0.1, ping_timeout=0.2)
    policy = CountingPolicy(seconds=1.5)
    with (
        server.background(policy, options) as uri,
        connect(uri, ping_interval=0.1, ping_timeout=0.2) as ws,
    ):
        ws.recv()
        ws.send(msgpack_numpy.pack(obs()))
        time.sleep(0.3)
        assert get(uri, "/healthz")[0] == 200
        reply: Any = ws.recv(timeout=10)
        assert msgpack_numpy.unpack(reply)["server_timing"]["infer_ms"] > 1400


def test_more_clients_than_sessions_are_told_so(policy):
    with server.background(policy, server.ServerOptions(port=0, max_sessions=1)) as uri:
        with connect(uri) as ws:
            ws.recv()
            with pytest.raises(InvalidStatus, match="503"):
                connect(uri)
            assert get(uri, "/healthz")[0] == 200
            assert ask(ws, obs())["actions"][0, 1] == 1
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                with connect(uri) as ws:
                    ws.recv()
                    assert ask(ws, obs())["actions"][0, 1] == 1
                return
            except InvalidStatus:
                time.sleep(0.02)
        pytest.fail("the session of a client that left was never given back")


def test_a_client_that_vanishes_during_inference_harms_nobody():
    policy = CountingPolicy(seconds=0.2)
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        gone = connect(uri)
        gone.recv()
        gone.send(msgpack_numpy.pack(obs()))
        gone.socket.shutdown(socket.SHUT_RDWR)
        with connect(uri) as ws:
            ws.recv()
            assert ask(ws, obs())["actions"][0, 1] == 1


def test_clients_learn_of_a_shutdown(policy):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        ws = connect(uri)
        ws.recv()
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(timeout=5)
    assert close_code(closed) == 1001
