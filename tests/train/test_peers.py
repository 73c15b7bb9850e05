"""Signs of life, with a store that lies in this process."""

import socket
import threading
import time

import jax
import pytest

from vla_jax.train import peers
from vla_jax.train.peers import Peers


class Store:
    """What jax's coordinator keeps."""

    def __init__(self):
        self.values = {}
        self.is_gone = False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.is_gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: no route")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, timeout):
        while key not in self.values:
            time.sleep(0.01)
        return self.values[key]


class Gone(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(peers, "_PERIOD", 0.02)

    def end():
        raise Gone

    monkeypatch.setattr(peers, "_end", end)
    return Store()


def one(store, me, count=3):
    created = Peers()
    created.count, created._me, created._client = count, me, store
    return created


def test_who_is_silent_is_named_with_its_step_and_where_to_go_on(store, capsys):
    actual, other = one(store, 0), one(store, 2)
    actual.at(12)
    actual.saved(10)
    other.at(11)
    other._write("1 11")
    assert actual._find(patience=0.1) == ""
    time.sleep(0.15)
    other._write("2 11")  # in time
    assert actual._find(patience=0.1) == ""
    time.sleep(0.15)
    with pytest.raises(Gone):
        actual._look(patience=0.1, seconds=1.0)
    message = capsys.readouterr().err
    assert (
        "process 2 has been silent for 0 s, since step 11; this is process 0, at step 12" in message
    )
    assert (
        "Start all processes again with the same command: training goes on from step 10" in message
    )
    assert message.count("\n") == 1


def test_who_is_done_may_be_silent(store):
    actual, other = one(store, 0), one(store, 1)
    other.stop()
    actual._find(patience=0.01)
    time.sleep(0.05)
    assert actual._find(patience=0.01) == ""


def test_who_fails_says_why_to_the_others(store, capsys):
    failing, other = one(store, 1), one(store, 2)
    failing.at(7)
    with pytest.raises(Gone), failing.leaving((KeyError,)):
        raise KeyError("no such thing")
    assert "KeyError: 'no such thing'" in capsys.readouterr().err
    assert other._find(patience=60.0) == "process 1 failed at step 7: KeyError: 'no such thing'"
    with pytest.raises(Gone), failing.leaving(()):
        raise OSError("unexpected")
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_another_caused_is_given_to_that_one(store, capsys):
    actual, lost = one(store, 0), one(store, 1)
    lost._write("9 30")
    with pytest.raises(Gone), actual.leaving(()):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection reset by peer")
    message = capsys.readouterr().err
    assert "process 1 has been silent" in message
    assert "Traceback" not in message


def test_alone_nothing_is_told_and_errors_pass(store):
    with pytest.raises(ValueError, match="mine"), Peers().leaving(()):
        raise ValueError("mine")


@pytest.mark.parametrize("orderly", [True, False])
def test_the_end_of_the_coordinator_is_known_at_once(store, monkeypatch, capsys, orderly):
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.0.1")
    first, second = one(store, 0, count=2), one(store, 1, count=2)
    ended = []

    def hold():
        try:
            second._hold()
        except Gone:
            ended.append("given up")

    threads = [threading.Thread(target=work, daemon=True) for work in (first._accept, hold)]
    for thread in threads:
        thread.start()
    while not first._ends:
        time.sleep(0.01)
    if orderly:
        first.stop()
    for end in first._ends:
        end.close()
    threads[1].join(timeout=5)
    assert ended == ([] if orderly else ["given up"])
    message = capsys.readouterr().err
    assert ("process 0, the coordinator, cannot be reached" in message) == (not orderly)
