"""Thousands of bad messages of every kind: each is refused, none is executed, nothing piles up."""

import contextlib
import itertools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, WebSocketException

from tests.serve.clients import ask, connect, numpy_json, obs, post
from tests.serve.fakes import BatchCountingPolicy
from vla_jax.inference.protocol import ObservationError
from vla_jax.serve import msgpack_numpy, server, transports
from vla_jax.serve.msgpack_numpy import WireError
from vla_jax.serve.transports.base import RequestError

ROOT = Path(__file__).resolve().parents[2]
SERVE = (
    "import logging\n"
    "from tests.serve.fakes import BatchCountingPolicy\n"
    "from vla_jax.serve import server\n"
    "logging.disable()\n"
    "options = server.ServerOptions(port=0, max_message_bytes=2**20)\n"
    "server.run(BatchCountingPolicy(), options, lambda uri: print(uri, flush=True))\n"
)


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def bad_messages(rng: np.random.Generator, trace: Path) -> Iterator[bytes]:
    """Websocket messages, without end."""
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    good = msgpack_numpy.pack({"observation/image": image, "prompt": "go"})
    bomb = pickle.dumps(Bomb(trace))
    array = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [3]}

    def with_array(**changes: object) -> bytes:
        fields = {**array, **{key.encode(): value for key, value in changes.items()}}
        return msgpack.packb({"observation/image": fields, "prompt": "go"}) or b""

    while True:
        yield rng.bytes(int(rng.integers(1, 400)))
        yield good[: rng.integers(1, len(good))]
        yield good + rng.bytes(4)
        yield b"\xc6\x40\x00\x00\x00" + rng.bytes(30)  # bytes: a gigabyte of them
        yield b"\xdd\x40\x00\x00\x00" + rng.bytes(30)  # a list of 2**30
        yield b"\xdf\x40\x00\x00\x00" + rng.bytes(30)  # a map of 2**30
        yield b"\xc9\x40\x00\x00\x00\x01"  # an extension of a gigabyte
        yield b"\x91" * 20_000
        yield with_array(shape=[2**28])
        yield with_array(shape=[2**40, 2**40])
        yield with_array(dtype="|O", data=bytes(24))
        yield with_array(dtype="|O", data=bomb, shape=[1])
        yield with_array(dtype="O", pickle=True)
        yield with_array(dtype=str(rng.choice(["<U4", "|V12", "<c8", "<M8[s]", "f4,f4", "x"])))
        yield with_array(dtype="<f8", shape=[1])
        yield bomb
        yield msgpack.packb(msgpack.ExtType(1, bomb)) or b""
        yield msgpack_numpy.pack({"observation/image": rng.random((16, 16, 3)), "prompt": "go"})
        yield msgpack_numpy.pack({"observation/image": image[..., :2], "prompt": "go"})
        yield msgpack_numpy.pack({"observation/image": image, "prompt": bomb})
        yield msgpack_numpy.pack({"endpoint": rng.integers(0, 9, 5), "prompt": "go"})


def bad_posts(rng: np.random.Generator, trace: Path) -> Iterator[bytes]:
    """Bodies of POST /act, without end."""
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    good = json.dumps({"image": image, "instruction": "go"}, default=numpy_json).encode()
    bomb = pickle.dumps(Bomb(trace))
    while True:
        yield rng.bytes(int(rng.integers(1, 400)))
        yield good[: rng.integers(1, len(good))]
        yield b"[" * 50_000
        yield b'{"py/object": "os.system", "image": null}'
        yield json.dumps({"image": bomb.decode("latin-1"), "instruction": "go"}).encode()
        for dtype, shape in (("|O", [1]), ("<f4", [2**28]), ("<f4", [-1]), ("V9", [])):
            array = {"__numpy__": "AAAA", "dtype": dtype, "shape": shape}
            yield json.dumps({"image": array, "instruction": "go"}).encode()
        yield json.dumps({"encoded": good.decode()[:-9]}).encode()
        yield json.dumps({"image": image / 255, "instruction": 3}, default=numpy_json).encode()


def bad_bytes(rng: np.random.Generator) -> Iterator[bytes]:
    """What is neither a handshake nor a request, without end."""
    while True:
        yield rng.bytes(300)
        yield b"POST " + rng.bytes(300) + b"\r\n\r\n"
        yield b"GET / HTTP/1.1\r\n" + rng.bytes(300) + b"\r\n\r\n"
        yield b"POST /act HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n"
        yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.bytes(200)  # TLS


def send_bad_message(uri: str, message: bytes) -> None:
    with connect(uri) as ws:
        ws.recv()
        reply = ask(ws, message)
        assert isinstance(reply, str)
        assert "see the server's log" not in reply  # refused, rather than failed on
        with pytest.raises(ConnectionClosed):
            ws.recv(timeout=5)


def send_bad_post(uri: str, body: bytes) -> None:
    status, reply = post(uri, body)
    assert 400 <= status < 500
    assert set(reply) == {"error"}


def send_bad_bytes(uri: str, data: bytes) -> None:
    address = urlsplit(uri)
    with socket.create_connection((address.hostname, address.port), timeout=5) as raw:
        try:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(2**16):
                pass
        except ConnectionResetError:
            pass


def attack(uri: str, count: int, trace: Path, seed: int = 0) -> None:
    """`count` bad messages over all the ways there are."""
    rng = np.random.default_rng(seed)
    messages, posts, rubbish = bad_messages(rng, trace), bad_posts(rng, trace), bad_bytes(rng)
    for i in range(count):
        if i % 4 < 2:
            send_bad_message(uri, next(messages))
        elif i % 4 == 2:
            send_bad_post(uri, next(posts))
        else:
            send_bad_bytes(uri, next(rubbish))


def test_bad_messages_are_refused_and_nobody_else_notices(tmp_path):
    options = server.ServerOptions(port=0, max_message_bytes=2**20)
    with server.background(BatchCountingPolicy(), options) as uri, connect(uri) as good:
        good.recv()
        for step in range(1, 4):
            attack(uri, 50, tmp_path / "executed", seed=step)
            assert ask(good, obs())["actions"][0, 1] == step
    assert not (tmp_path / "executed").exists()


def memory(pid: int) -> float:
    """MiB in use by a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_ten_thousand_bad_messages_leave_no_trace(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        try:
            attack(uri, 1000, tmp_path / "executed", seed=0)
            time.sleep(0.5)
            before, files = memory(process.pid), open_files(process.pid)
            for seed in range(1, 11):
                attack(uri, 1000, tmp_path / "executed", seed=seed)
            time.sleep(0.5)
            after = memory(process.pid)
            assert process.poll() is None
            with connect(uri) as ws:
                ws.recv()
                assert ask(ws, obs())["actions"][0, 1] == 1
            print(f"RSS {before:.1f} -> {after:.1f} MiB over 10 000 bad messages")
            assert after - before < 3
            assert open_files(process.pid) <= files + 1
            assert not (tmp_path / "executed").exists()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0


def test_the_server_cannot_unpickle():
    """No code path from bytes to code: nothing in serve/ names pickle, eval or numpy's loaders."""
    forbidden = re.compile(
        r"(?<!vla-)\b(pickle|marshal|shelve|dill|joblib|eval|exec|allow_pickle|np\.load|"
        r"jsonpickle|yaml)\b(?!:)"
    )
    files = list((ROOT / "vla_jax/serve").rglob("*.py"))
    assert len(files) > 10
    code = itertools.chain.from_iterable(
        ((file.name, line) for line in file.read_text().splitlines()) for file in files
    )
    results = [(name, line) for name, line in code if forbidden.search(line)]
    assert [line.strip() for _, line in results if "no pickle" not in line] == []


def test_a_handshake_with_the_wrong_key_costs_nothing(tmp_path):
    options = server.ServerOptions(port=0, api_key="right")
    with server.background(BatchCountingPolicy(), options) as uri:
        for _ in range(30):
            with pytest.raises(WebSocketException):
                connect(uri, additional_headers={"Authorization": "Api-Key wrong"})
        headers = {"Authorization": "Api-Key right"}
        with connect(uri, additional_headers=headers) as ws:
            ws.recv()
            assert ask(ws, obs())["actions"][0, 1] == 1


def test_no_wire_lets_another_error_out(tmp_path):
    """What a wire cannot read is refused in one of the three ways that the server answers."""
    rng = np.random.default_rng(5)
    messages, posts = (
        bad_messages(rng, tmp_path / "executed"),
        bad_posts(rng, tmp_path / "executed"),
    )
    wires = [wire({"dataset": "tabletop"}) for wire in transports.WIRES]
    for _ in range(300):
        message = next(messages)
        enveloped = {"type": "observation", "payload": message, "seq": 1, "timestamp": 0.0}
        for body in (message, next(posts), msgpack.packb(enveloped)):
            assert body is not None
            for wire in wires:
                with contextlib.suppress(RequestError, WireError, ObservationError):
                    wire.read(body)
    assert not (tmp_path / "executed").exists()
