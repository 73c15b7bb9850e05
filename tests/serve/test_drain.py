"""A server that is told to end while it computes."""

import threading

import pytest
from websockets.exceptions import ConnectionClosed

from tests.serve.clients import IMAGE, ask, close_code, connect, http_connection, obs, post
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server


class Slow(CountingPolicy):
    """Says when it has begun to compute."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.begun = threading.Event()

    def infer(self, session, obs):
        self.begun.set()
        return super().infer(session, obs)


def in_flight(policy, options, request):
    """What `request(uri)` returns when the server is told to end while it is computed."""
    collected = []
    with server.background(policy, options) as uri:
        thread = threading.Thread(target=lambda: collected.append(request(uri)))
        thread.start()
        assert policy.begun.wait(10)
    thread.join(timeout=10)
    return collected[0]


def websocket(uri):
    with connect(uri) as ws:
        ws.recv(timeout=10)
        reply = ask(ws, obs("go"))
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=10)
        return reply, close_code(closed)


def test_a_reply_of_either_kind_is_still_sent():
    options = server.ServerOptions(port=0)
    reply, code = in_flight(Slow(0.3), options, websocket)
    assert reply["actions"].shape == (4, 7)
    assert code == 1001
    connections = []

    def rest(uri):
        connections.append(http_connection(uri))
        return post(connections[0], {"image": IMAGE, "instruction": "go"})

    status, action = in_flight(Slow(0.3), options, rest)
    assert (status, action.shape) == (200, (7,))
    assert connections[0].sock is None  # "Connection: close"


def test_who_cannot_be_answered_in_time_is_told_so():
    options = server.ServerOptions(port=0, drain_timeout=0.1)
    reply, code = in_flight(Slow(1.0), options, websocket)
    assert reply == "the server is shutting down"
    assert code == 1011
    request = {"image": IMAGE, "instruction": "go"}
    status, body = in_flight(Slow(1.0), options, lambda uri: post(uri, request))
    assert (status, body) == (503, {"error": "the server is shutting down"})
