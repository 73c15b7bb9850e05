"""Who gets in, what is counted, and what happens to those who take too much."""

import re
import socket
import struct
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from eval_servers.client import PolicyClient, PolicyServerError, SessionLostError
from tests.serve.clients import IMAGE, ask, close_code, connect, get, obs, post
from tests.serve.fakes import CountingPolicy
from vla_jax.inference.protocol import ObservationError
from vla_jax.serve import front, msgpack_numpy, server, websocket
from vla_jax.serve.options import ServerOptions
from vla_jax.serve.transports.base import MAX_ERROR

KEY = "s3cret-key"


@pytest.fixture
def guarded():
    with server.background(CountingPolicy(), ServerOptions(port=0, api_key=KEY)) as uri:
        yield uri


def samples(uri, **headers):
    status, page = get(uri, "/metrics", **headers)
    assert status == 200
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def eventually(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "header", ["", KEY, f"Bearer {KEY}", f"Api-Key {KEY}x", f"Api-Key {KEY[:-1]}", "Api-Key ü"]
)
def test_without_the_key_nothing_is_served(guarded, header):
    headers = {"Authorization": header} if header else {}
    with pytest.raises(InvalidStatus, match="401"):
        connect(guarded, additional_headers=headers)
    status, reply = post(guarded, {"image": IMAGE, "instruction": "go"}, **headers)
    assert status == 401
    assert "Api-Key KEY" in reply["error"]
    assert get(guarded, "/metrics", **headers)[0] == 401
    assert get(guarded, "/healthz")[0] == 200


def test_with_the_key_all_is_served(guarded):
    headers = {"Authorization": f"Api-Key {KEY}"}
    with connect(guarded, additional_headers=headers) as ws:
        ws.recv()
        assert ask(ws, obs())["actions"].shape == (4, 7)
    assert post(guarded, {"image": IMAGE, "instruction": "go"}, **headers)[0] == 200
    assert samples(guarded, **headers)['vla_requests_total{transport="rest"}'] == 1


def test_the_client_sends_its_key_and_a_wrong_one_is_not_tried_again(guarded, monkeypatch):
    with PolicyClient(guarded, api_key=KEY) as client:
        assert client.infer(obs())["actions"].shape == (4, 7)
    monkeypatch.setenv("VLA_API_KEY", KEY)
    PolicyClient(guarded).close()
    begin = time.monotonic()
    with pytest.raises(PolicyServerError, match="wants its API key: set VLA_API_KEY"):
        PolicyClient(guarded, api_key="wrong")
    assert time.monotonic() - begin < 5


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match=r"port.*max_sessions.*max_wait.*api_key"):
        ServerOptions(port=-1, max_sessions=0, max_wait=-1.0, api_key="two words")
    assert KEY not in repr(ServerOptions(api_key=KEY))


def test_metrics_count_what_happened():
    with server.background(CountingPolicy(fail_on="crash"), ServerOptions(port=0)) as uri:
        with connect(uri) as ws, connect(uri) as bad, connect(uri) as wrong:
            for each in (ws, bad, wrong):
                each.recv()
            for _ in range(3):
                ask(ws, obs())
            ask(bad, b"\xc1")
            ask(wrong, {"prompt": "go"})
            post(uri, {"image": IMAGE, "instruction": "crash"})
            post(uri, {"image": IMAGE, "instruction": "go"})
            eventually(lambda: samples(uri)["vla_sessions"] == 1)
            result = samples(uri)
        assert result['vla_requests_total{transport="websocket"}'] == 3
        assert result['vla_requests_total{transport="rest"}'] == 1
        reasons = {r: result[f'vla_errors_total{{reason="{r}"}}'] for r in ERRORS}
        assert reasons == {"malformed": 1, "observation": 1, "policy": 1}
        # Six asked something of the policy: of two it made nothing.
        assert result["vla_batch_size_count"] == 6
        assert result['vla_batch_size_bucket{le="1.0"}'] == 6
        assert result["vla_request_seconds_count"] == 4
        assert 0 < result["vla_request_seconds_sum"] < 5
        assert result["vla_queue"] == 0
        assert result["vla_connections"] >= 1
        eventually(lambda: samples(uri)["vla_sessions"] == 0)


ERRORS = ("malformed", "observation", "policy")


def test_the_page_is_prometheus_text():
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri:
        post(uri, {"image": IMAGE, "instruction": "go"})
        page = get(uri, "/metrics")[1].decode()
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"\})? [0-9.e+-]+')
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.M))
    assert kinds["vla_request_seconds"] == "histogram"
    for line in page.splitlines():
        assert line.startswith("# ") or sample.fullmatch(line), line
    counts = [float(x) for x in re.findall(r"^vla_infer_seconds_bucket.* (\S+)$", page, re.M)]
    assert counts == sorted(counts)
    assert counts[-1] == 1


def test_an_idle_session_ends_and_its_client_may_start_over():
    options = ServerOptions(port=0, idle_timeout=1.0)
    with server.background(CountingPolicy(), options) as uri:
        with connect(uri) as ws:
            ws.recv()
            ask(ws, obs())
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=5)
            assert close_code(closed) == 1001
            assert "no request in 1 s" in str(closed.value)
        client = PolicyClient(uri)
        client.infer(obs())
        time.sleep(1.3)
        with pytest.raises(SessionLostError):
            client.infer(obs())
        assert client.infer(obs())["actions"][0, 1] == 1
        client.close()


def raw(uri):
    address = urlsplit(uri)
    return socket.create_connection((address.hostname, address.port), timeout=5)


def is_over(connection):
    try:
        return connection.recv(2**16) == b""
    except ConnectionResetError:
        return True


def sends_all(connection, pieces, pause=0.0):
    """Whether the other side takes all of it."""
    try:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
    except OSError:
        return False
    return True


BEGINNINGS = {
    "nothing": b"",
    "half a verb": b"PO",
    "half a handshake": b"GET / HTTP/1.1\r\nHost: x\r\n",
    "half a header": b"POST /act HTTP/1.1\r\nContent-Le",
    "half a body": b"POST /act HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    "garbage": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_those_who_never_finish_are_dropped(name):
    options = ServerOptions(port=0, open_timeout=0.6)
    with server.background(CountingPolicy(), options) as uri, raw(uri) as slow:
        slow.sendall(BEGINNINGS[name])
        begin = time.monotonic()
        reply = b""
        while more := slow.recv(2**16) if name != "nothing" or reply == b"" else b"":
            reply += more
        assert time.monotonic() - begin < 4
        assert b"200" not in reply
        assert post(uri, {"image": IMAGE, "instruction": "go"})[0] == 200


def test_one_byte_at_a_time_is_too_slow():
    options = ServerOptions(port=0, open_timeout=0.5)
    with server.background(CountingPolicy(), options) as uri, raw(uri) as slow:
        begin = time.monotonic()
        letters = b"POST /act HTTP/1.1\r\n" + b"X: y\r\n" * 100
        assert not sends_all(slow, [bytes([letter]) for letter in letters], pause=0.02)
        assert time.monotonic() - begin < 3


def test_connections_have_a_limit_and_come_back(monkeypatch):
    monkeypatch.setattr(front, "SPARE_CONNECTIONS", 2)
    options = ServerOptions(port=0, max_sessions=2, open_timeout=5.0)
    with server.background(CountingPolicy(), options) as uri:
        crowd = [raw(uri) for _ in range(4)]
        time.sleep(0.1)
        with raw(uri) as late:
            assert is_over(late)
        for single in crowd:
            single.close()
        time.sleep(0.1)
        assert post(uri, {"image": IMAGE, "instruction": "go"})[0] == 200


def handshake(uri, receive_buffer=0):
    """A connection on which frames can be written by hand."""
    address = urlsplit(uri)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((address.hostname, address.port))
    connection.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(1)
    assert reply.startswith(b"HTTP/1.1 101")
    return connection


def frame(opcode, payload=b"", fin=True, claimed=None):
    size = len(payload) if claimed is None else claimed
    head = bytes([opcode | 0x80 * fin])
    head += bytes([0x80 | size]) if size < 126 else b"\xff" + struct.pack(">Q", size)
    return head + bytes(4) + payload  # the mask is zero


def test_a_frame_that_claims_a_gigabyte_is_refused_at_its_head():
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri, handshake(uri) as ws:
        ws.sendall(frame(2, claimed=2**30))
        assert b"message too large" in everything_from(ws)
        ws.close()
        eventually(lambda: samples(uri)["vla_sessions"] == 0)
        assert samples(uri)['vla_errors_total{reason="too_large"}'] == 1


def everything_from(connection):
    reply = b""
    try:
        while more := connection.recv(2**16):
            reply += more
    except ConnectionResetError:
        pass
    return reply


def test_endless_empty_fragments_end():
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri, handshake(uri) as ws:
        ws.sendall(frame(2, fin=False) + (frame(0, fin=False) + frame(9)) * websocket.MAX_FRAGMENTS)
        assert b"fragments" in everything_from(ws)


def test_a_message_may_come_in_pieces():
    data = msgpack_numpy.pack(obs())
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri, handshake(uri) as ws:
        pieces = [frame(0, data[i : i + 100], fin=False) for i in range(100, len(data), 100)]
        ws.sendall(frame(2, data[:100], fin=False) + frame(9).join(pieces) + frame(0))
        reply = b""
        while b"server_timing" not in reply:
            reply += ws.recv(2**16)
        assert b"actions" in reply


def test_one_who_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(front, "MAX_UNREAD", 2**12)
    options = ServerOptions(port=0)
    with server.background(CountingPolicy(), options) as uri, handshake(uri, 2**12) as ws:
        assert not sends_all(ws, [frame(9, bytes(125)) * 1000] * 200)
        ws.close()
        eventually(lambda: samples(uri)['vla_errors_total{reason="too_large"}'] == 1, 20.0)


def test_a_silent_connection_does_not_hold_up_the_end():
    begin = time.monotonic()
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri:
        silent, posting = raw(uri), raw(uri)
        posting.sendall(b"POST /act HTTP/1.1\r\n")
        time.sleep(0.1)
    assert time.monotonic() - begin < 3
    silent.close()
    posting.close()


def test_array_and_text_for_every_key():
    """Values of the wrong kind anywhere are answered, not raised."""
    values = [None, True, 3, 2.5, "x", b"x", [[1], [2, 3]], {"a": {}}, np.zeros(3), np.float32(1)]
    keys = ["endpoint", "prompt", "observation/image", "observation/state", "other"]
    with server.background(CountingPolicy(), ServerOptions(port=0)) as uri:
        for key in keys:
            for value in values:
                with connect(uri) as ws:
                    ws.recv()
                    reply = ask(ws, msgpack_numpy.pack(obs(**{key: value})))
                    assert isinstance(reply, (str, dict))
                    assert "see the server's log" not in str(reply)


class Quoting(CountingPolicy):
    def check(self, obs):
        raise ObservationError(f"got {sorted(obs)}")


def test_a_refusal_does_not_give_back_all_it_was_sent(caplog):
    request = {"k" * 10**5 + str(i): 1 for i in range(10)}
    with server.background(Quoting(), ServerOptions(port=0)) as uri:
        with connect(uri) as ws:
            ws.recv()
            message = ask(ws, request)
        status, reply = post(uri, request)
    assert status == 422
    for text in (message, reply["error"]):
        assert text.startswith("got ['kkk")
        assert len(text) <= MAX_ERROR
    assert all(len(record.getMessage()) < 3000 for record in caplog.records)
