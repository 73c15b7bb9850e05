import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus

from tests.serve.clients import (
    IMAGE,
    ask,
    connect,
    from_numpy_json,
    http_connection,
    numpy_json,
    obs,
    post,
)
from tests.serve.fakes import BatchCountingPolicy, CountingPolicy
from vla_jax.serve import msgpack_numpy, server

REQUEST = {"image": IMAGE, "instruction": "go"}


@pytest.fixture
def policy():
    return CountingPolicy(fail_on="crash")


@pytest.fixture
def uri(policy):
    policy.metadata["dataset"] = "tabletop"
    options = server.ServerOptions(port=0, max_message_bytes=2**20, open_timeout=2.0)
    with server.background(policy, options) as uri:
        yield uri


def test_openvlas_request_gets_one_action(uri):
    status, action = post(uri, {**REQUEST, "unnorm_key": "tabletop"})
    assert status == 200
    assert action.shape == (7,)
    assert action.dtype == np.float32
    assert action.tolist() == [1, 1, 0, 7, 0, 0, 0]


def test_a_request_encoded_twice_gets_a_reply_encoded_twice(uri):
    status, text = post(uri, {"encoded": json.dumps(REQUEST, default=numpy_json)})
    assert status == 200
    assert isinstance(text, str)
    assert json.loads(text, object_hook=from_numpy_json)[3] == 7


def test_openvla_oft_gets_the_whole_chunk(uri):
    """A list of actions, as its clients put into their queue."""
    request = {"full_image": IMAGE, "state": np.zeros(8), "instruction": "go"}
    status, actions = post(uri, request)
    assert status == 200
    assert isinstance(actions, list)
    assert [action.tolist()[:3] for action in actions] == [[1, 1, i] for i in range(4)]
    status, text = post(uri, {"encoded": json.dumps(request, default=numpy_json)})
    assert len(json.loads(text, object_hook=from_numpy_json)) == 4


def test_our_own_names(uri):
    assert post(uri, {"observation/image": IMAGE, "prompt": "go"})[1].shape == (7,)


def test_history_belongs_to_the_session_id(uri):
    def steps(count, **changes):
        request = {**REQUEST, **changes}
        return [int(post(uri, request)[1][1]) for _ in range(count)]

    assert steps(3) == [1, 1, 1]
    assert steps(3, session_id="a") == [1, 2, 3]
    assert steps(2, session_id="b") == [1, 2]
    assert steps(2, session_id="a") == [4, 5]
    assert steps(1, session_id="a", reset=True) == [1]
    assert steps(2, session_id="a") == [2, 3]
    assert steps(2, session_id="a", instruction="other") == [1, 2]


def test_one_connection_serves_many_requests(uri):
    connection = http_connection(uri)
    connection.connect()
    socket = connection.sock
    for step in (1, 2, 3):
        status, action = post(connection, {**REQUEST, "session_id": "x"})
        assert (status, action[1]) == (200, step)
    assert post(connection, {"instruction": "go"})[0] == 422
    assert post(connection, REQUEST)[0] == 200
    assert connection.sock is socket


def test_both_protocols_share_batches():
    policy = BatchCountingPolicy(seconds=0.15)
    with server.background(policy, server.ServerOptions(port=0)) as uri, connect(uri) as ws:
        ws.recv()
        replies: list[Any] = []
        jobs = [threading.Thread(target=lambda: replies.append(post(uri, REQUEST)))]
        jobs += [threading.Thread(target=lambda: replies.append(post(uri, REQUEST)))]
        ws.send(msgpack_numpy.pack(obs()))
        time.sleep(0.05)
        for job in jobs:
            job.start()
        ws.recv()
        for job in jobs:
            job.join()
    assert [status for status, _ in replies] == [200, 200]
    assert sorted(policy.batches) in ([1, 2], [1, 1, 1])


BAD: dict[str, tuple[Any, int, list[str]]] = {
    "not JSON": (b"\x00garbage", 400, ["JSON"]),
    "a list": (b"[1, 2]", 400, ["object", "list"]),
    "deep": (b"[" * 3000 + b"]" * 3000, 400, ["nested more than"]),
    "no image": ({"instruction": "go"}, 422, ["observation/image: missing", "'image'"]),
    "float image": ({**REQUEST, "image": IMAGE / 255}, 422, ["float64"]),
    "plain list": ({**REQUEST, "image": [[1] * 9] * 6000}, 400, ["4096", "json_numpy"]),
    "object array": (
        {**REQUEST, "image": {"__numpy__": "", "dtype": "|O", "shape": [0]}},
        400,
        ["|O"],
    ),
    "other units": ({**REQUEST, "unnorm_key": "bridge_orig"}, 422, ["bridge_orig", "tabletop"]),
    "array key": ({**REQUEST, "unnorm_key": IMAGE}, 422, ["tabletop"]),
    "session": ({**REQUEST, "session_id": 3}, 400, ["session_id"]),
    "reset": ({**REQUEST, "session_id": "a", "reset": "yes"}, 400, ["reset"]),
    "policy bug": ({**REQUEST, "instruction": "crash"}, 500, ["told to fail"]),
    "not finite": ({**REQUEST, "instruction": "nan"}, 500, ["finite"]),
    "too large": ({**REQUEST, "image": np.zeros(2**20, np.uint8)}, 413, ["too large", "1048576"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_why(uri, name):
    request, wanted, reasons = BAD[name]
    status, reply = post(uri, request)
    assert status == wanted
    assert set(reply) == {"error"}
    assert all(reason in reply["error"] for reason in reasons), reply
    assert post(uri, REQUEST)[0] == 200


def test_the_status_line_says_why(uri):
    """`raise_for_status` of requests shows nothing else."""
    connection = http_connection(uri)
    body = json.dumps({**REQUEST, "unnorm_key": "brid\r\nge \u00fc"}, default=numpy_json)
    connection.request("POST", "/act", body)
    response = connection.getresponse()
    assert response.status == 422
    assert response.reason.startswith("unnorm_key 'brid\\r\\nge ?': this server's actions are")
    connection = http_connection(uri)
    connection.request("POST", "/act", json.dumps({"image": {"__numpy__": "", "dtype": "|O"}}))
    response = connection.getresponse()
    assert response.reason.startswith("'image': array with the keys ['__numpy__', 'dtype']")


def test_datasets_go_by_several_names(policy):
    policy.metadata |= {"dataset": "bridge_dataset", "observation": {"aliases": ["mine"]}}
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        for name in ("bridge_dataset", "bridge_orig", "mine"):
            assert post(uri, {**REQUEST, "unnorm_key": name})[0] == 200
        status, reply = post(uri, {**REQUEST, "unnorm_key": "fractal20220817_data"})
        assert status == 422
        assert "also known as ['mine']" in reply["error"]
    policy.metadata |= {"dataset": "libero_spatial_no_noops"}
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        assert post(uri, {**REQUEST, "unnorm_key": "libero_spatial"})[0] == 200


def test_other_paths(uri):
    assert post(uri, REQUEST, path="/predict")[0] == 404
    assert post(uri, REQUEST, path="/act?x=1")[0] == 200


def send_raw(uri, data, timeout=5.0):
    address = urlsplit(uri)
    with socket.create_connection((address.hostname, address.port), timeout=timeout) as raw:
        raw.sendall(data)
        reply = b""
        while more := raw.recv(2**16):
            reply += more
    return reply


RAW = {
    "no length": (b"POST /act HTTP/1.1\r\n\r\n", b"411"),
    "chunks": (b"POST /act HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
    "two lengths": (
        b"POST /act HTTP/1.1\r\nContent-Length: 2\r\ncontent-length: 9\r\n\r\n",
        b"400",
    ),
    "negative": (b"POST /act HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411"),
    "foreign digits": ("POST /act HTTP/1.1\r\nContent-Length: ²\r\n\r\n".encode("latin-1"), b"411"),
    "a gigabyte": (b"POST /act HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n", b"413"),
    "another protocol": (b"POST /act SIP/2.0\r\n\r\n", b"400"),
    "no colon": (b"POST /act HTTP/1.1\r\nhello\r\n\r\n", b"400"),
    "folded": (b"POST /act HTTP/1.1\r\nA: b\r\n c: d\r\n\r\n", b"400"),
    "long header": (b"POST /act HTTP/1.1\r\nA: " + b"x" * 2**17 + b"\r\n\r\n", b"431"),
}


@pytest.mark.parametrize("name", RAW)
def test_http_that_is_not_understood(uri, name):
    data, status = RAW[name]
    assert send_raw(uri, data).startswith(b"HTTP/1.1 " + status)
    assert post(uri, REQUEST)[0] == 200


def test_curl_asks_before_it_sends_much(uri):
    body = json.dumps(REQUEST, default=numpy_json).encode()
    head = b"POST /act HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n"
    reply = send_raw(uri, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


def test_a_session_has_one_request_at_a_time():
    with server.background(CountingPolicy(seconds=0.4), server.ServerOptions(port=0)) as uri:
        request = {**REQUEST, "session_id": "a"}
        first = threading.Thread(target=post, args=(uri, request))
        first.start()
        time.sleep(0.15)
        status, reply = post(uri, request)
        assert status == 409
        assert "one session is one robot" in reply["error"]
        first.join()
        assert post(uri, request)[1][1] == 2


def test_named_sessions_count_and_idle_ones_are_forgotten(policy):
    options = server.ServerOptions(port=0, max_sessions=2, idle_timeout=4.0)
    with server.background(policy, options) as uri:
        for name in "ab":
            assert post(uri, {**REQUEST, "session_id": name})[0] == 200
        status, reply = post(uri, {**REQUEST, "session_id": "c"})
        assert status == 503
        assert "all 2 sessions" in reply["error"]
        assert post(uri, REQUEST)[0] == 200  # needs no session
        with pytest.raises(InvalidStatus, match="503"):
            connect(uri)
        time.sleep(4.1)
        with connect(uri) as ws:
            ws.recv()
            assert ask(ws, obs())["actions"][0, 1] == 1
            assert post(uri, {**REQUEST, "session_id": "c"})[1][1] == 1


def test_a_session_that_was_never_answered_takes_no_seat(policy):
    with server.background(policy, server.ServerOptions(port=0, max_sessions=1)) as uri:
        for name in "abc":
            assert post(uri, {"session_id": name})[0] == 422
        assert post(uri, {**REQUEST, "session_id": "d"})[0] == 200


def test_a_policy_with_a_history_is_said_to_need_session_ids(policy, caplog):
    policy.metadata["window"] = 8
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        for _ in range(2):
            post(uri, REQUEST)
    assert [r.message for r in caplog.records if "session_id" in r.message] == [
        "POST /act without a session_id: each request is the first of an episode, and this policy "
        "was trained on a history of 8 steps"
    ]
