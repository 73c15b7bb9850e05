import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from eval_servers import client as client_module
from eval_servers.client import ActionChunks, PolicyClient, PolicyServerError, SessionLostError
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

OBS: Any = {"observation/image": np.zeros((8, 8, 3), np.uint8), "prompt": "go"}


@pytest.fixture
def policy():
    return CountingPolicy(fail_on="crash")


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0, max_message_bytes=2**20)) as uri:
        yield uri


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_infer_and_reset(uri, policy):
    with PolicyClient(uri) as client:
        assert client.metadata.items() >= policy.metadata.items()
        steps = [client.infer(OBS)["actions"][0, 1] for _ in range(2)]
        client.reset()
        steps.append(client.infer(OBS)["actions"][0, 1])
    assert steps == [1, 2, 1]


def test_waits_for_the_server():
    port = free_port()
    options = server.ServerOptions(port=port)
    stop = threading.Event()

    def late():
        time.sleep(0.5)
        with server.background(CountingPolicy(), options):
            stop.wait()

    thread = threading.Thread(target=late)
    thread.start()
    try:
        with PolicyClient(f"ws://127.0.0.1:{port}", connect_timeout=10) as client:
            assert client.infer(OBS)["actions"][0, 1] == 1
    finally:
        stop.set()
        thread.join()


def test_says_that_there_is_no_server():
    uri = f"ws://127.0.0.1:{free_port()}"
    with pytest.raises(PolicyServerError, match=r"no policy server at .*0\.3 s.*: vla serve"):
        PolicyClient(uri, connect_timeout=0.3)
    with pytest.raises(PolicyServerError, match="ws://host:port"):
        PolicyClient("localhost:8000")


def test_a_refusal_carries_the_servers_reason_and_the_client_goes_on(uri):
    with PolicyClient(uri) as client:
        with pytest.raises(PolicyServerError, match="prompt: missing"):
            client.infer({"observation/image": OBS["observation/image"]})
        assert client.infer(OBS)["actions"][0, 1] == 1


def test_a_huge_message_is_refused_with_the_limit(uri):
    with PolicyClient(uri) as client:
        huge = dict(OBS, extra=np.zeros(30 * 2**20, np.uint8))
        with pytest.raises(PolicyServerError, match=r"too large.*1048576.*max-message-mb"):
            client.infer(huge)
        assert client.infer(OBS)["actions"][0, 1] == 1


def test_a_dropped_connection_is_reported_and_repaired(uri):
    with PolicyClient(uri) as client:
        client.infer(OBS)
        client._socket.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(SessionLostError, match="start it over"):
            client.infer(OBS)
        assert client.infer(OBS)["actions"][0, 1] == 1


def test_a_restarted_server_is_found_again():
    options = server.ServerOptions(port=free_port())
    with server.background(CountingPolicy(), options) as uri:
        client = PolicyClient(uri, connect_timeout=10)
        client.infer(OBS)
    with server.background(CountingPolicy(), options):
        with pytest.raises(SessionLostError):
            client.infer(OBS)
        assert client.infer(OBS)["actions"][0, :2].tolist() == [1, 1]
        client.close()


def test_a_restart_with_another_policy_is_an_error():
    options = server.ServerOptions(port=free_port())
    with server.background(CountingPolicy(), options) as uri:
        client = PolicyClient(uri, connect_timeout=10)
    other = CountingPolicy()
    other.metadata["step"] = 2
    with (
        server.background(other, options),
        pytest.raises(PolicyServerError, match="another policy"),
    ):
        client.infer(OBS)


def test_a_silent_server_is_given_up_on():
    options = server.ServerOptions(port=0)
    with (
        server.background(CountingPolicy(seconds=1.0), options) as uri,
        PolicyClient(uri, request_timeout=0.2) as client,
        pytest.raises(PolicyServerError, match=r"no reply .* within 0\.2 s"),
    ):
        client.infer(OBS)


@pytest.mark.parametrize("greeting", ["text", b"\xc1"])
def test_something_else_on_the_port(greeting):
    from websockets.sync.server import serve

    with serve(lambda ws: ws.send(greeting), "127.0.0.1", 0) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        port = other.socket.getsockname()[1]
        with pytest.raises(PolicyServerError, match="not as a policy server"):
            PolicyClient(f"ws://127.0.0.1:{port}", connect_timeout=5)
        other.shutdown()
        thread.join()


def test_chunks_are_replayed_then_asked_for_again(uri):
    with PolicyClient(uri) as client:
        chunks = ActionChunks(client, execute_steps=3)
        actions = [chunks.act(lambda: OBS) for _ in range(7)]
        assert [(a[1], a[2]) for a in actions] == [
            (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0)
        ]  # fmt: skip
        assert len(chunks.round_trip_ms) == len(chunks.server_ms) == 3
        assert all(a >= b for a, b in zip(chunks.round_trip_ms, chunks.server_ms, strict=True))
        chunks.reset()
        assert chunks.act(lambda: OBS)[2] == 0
        assert len(chunks.round_trip_ms) == 4


@pytest.mark.parametrize("steps", [0, 5])
def test_execute_steps_must_fit_the_chunk(uri, steps):
    with (
        PolicyClient(uri) as client,
        pytest.raises(ValueError, match=rf"{steps} is not in 1\.\.4"),
    ):
        ActionChunks(client, execute_steps=steps)


def test_actions_of_a_wrong_shape_are_refused():
    class Odd:
        def __init__(self, actions):
            self.metadata = {}
            self.actions = actions

        def infer(self, obs):
            return {"actions": self.actions}

    for actions in (np.zeros(7), np.zeros((1, 7))):
        with pytest.raises(PolicyServerError, match="shape"):
            ActionChunks(Odd(actions), execute_steps=2).act(lambda: OBS)


def test_a_server_that_never_greets_keeps_no_connection(monkeypatch):
    opened = []

    class Silent:
        socket = socket.socket()

        def __init__(self):
            self.closed = False
            opened.append(self)

        def recv(self, timeout):
            raise TimeoutError

        def close(self):
            self.closed = True

    monkeypatch.setattr(client_module, "connect", lambda uri, **options: Silent())
    with pytest.raises(PolicyServerError, match="no policy server at"):
        PolicyClient("ws://127.0.0.1:1", connect_timeout=0.5)
    assert len(opened) > 1
    assert all(each.closed for each in opened)


def test_proxies_of_the_environment_do_not_stand_before_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.2", "localhost"):
        with server.background(CountingPolicy(), server.ServerOptions(host=host, port=0)) as uri:
            PolicyClient(uri, connect_timeout=10.0).close()
    with pytest.raises(
        PolicyServerError, match=r"proxy http://127\.0\.0\.1:9 .*no_proxy=far\.test"
    ):
        PolicyClient("ws://far.test:8000", connect_timeout=0.3)
