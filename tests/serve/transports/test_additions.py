"""A wire from outside the package: one class, and one entry of the table."""

import json

import numpy as np
import pytest

from tests.serve.clients import IMAGE, ask, connect, http_connection, obs
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server, transports
from vla_jax.serve.transports.base import PostWire, Request, RequestError, WebsocketWire

GRAY = [[7, 7], [7, 7]]


def read_lists(message):
    """{"gray": rows of numbers, "say": instruction}, or the word "again"."""
    if message in ("again", b"again"):
        return Request(reset=True, answer="ready")
    try:
        parsed = json.loads(message)
        gray = np.array(parsed["gray"], np.uint8)
    except (ValueError, KeyError) as error:
        raise RequestError(f"not a list of rows: {error}") from error
    image = np.repeat(gray[:, :, None], 3, axis=2)
    return Request({"observation/image": image, "prompt": parsed["say"]}, note=parsed.get("number"))


class Lists:
    name = "lists"

    def read(self, message):
        return read_lists(message)

    def write(self, request, reply):
        return json.dumps({"number": request.note, "move": reply["actions"][0].tolist()})

    def refuse(self, request, error):
        return json.dumps({"wrong": str(error)})


class ListsOverWebsocket(Lists, WebsocketWire):
    path = "/lists"

    def greet(self):
        return None  # this kind of client speaks first


class ListsOverPost(Lists, PostWire):
    path = "/lists/once"


@pytest.fixture
def uri(monkeypatch):
    added = (*transports.WIRES, ListsOverWebsocket, ListsOverPost)
    monkeypatch.setattr(transports, "WIRES", added)
    with server.background(CountingPolicy(), server.ServerOptions(port=0)) as uri:
        yield uri


def test_a_wire_added_from_outside_is_served_at_its_path(uri):
    with connect(uri + "/lists") as ws:

        def say(message):
            ws.send(message)
            return ws.recv(timeout=10)

        request = json.dumps({"gray": GRAY, "say": "go", "number": 5})
        assert json.loads(say(request)) == {"number": 5, "move": [1, 1, 0, 7, 0, 0, 0]}
        assert json.loads(say(request))["move"][1] == 2
        assert say("again") == "ready"
        assert json.loads(say(request))["move"][1] == 1
        assert "not a list of rows" in json.loads(say("{}"))["wrong"]
    connection = http_connection(uri)
    connection.request("POST", "/lists/once", json.dumps({"gray": GRAY, "say": "go"}))
    assert json.loads(connection.getresponse().read())["move"][3] == 7


def test_it_shares_the_port_with_the_others(uri):
    with connect(uri + "/any/other/path") as ws:
        ws.recv()
        assert ask(ws, obs(**{"observation/image": IMAGE}))["actions"][0, 3] == 7


def test_no_two_wires_have_one_path_or_name():
    assert len({wire.path for wire in transports.WIRES}) == len(transports.WIRES)
    assert len({wire.name for wire in transports.WIRES}) == len(transports.WIRES)
