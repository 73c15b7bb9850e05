"""Processes that work at jobs: their order, their errors, and how they end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_refusal import start_in_foreground
from vla_jax import workers


def _slow_at_first(number):
    time.sleep(0.2 if number == 0 else 0)
    return number * number


def _mark(job):
    folder, number = job
    (folder / str(number)).touch()
    time.sleep(0.05)
    if number == 1:
        raise ValueError("the second job fails")


def test_results_come_in_the_order_of_the_jobs():
    with workers.in_order(_slow_at_first, range(5), 2) as results:
        assert list(results) == [0, 1, 4, 9, 16]


def test_an_error_of_a_job_is_raised_and_cancels_those_that_wait(tmp_path):
    with (
        pytest.raises(ValueError, match="the second job fails"),
        workers.in_order(_mark, [(tmp_path, n) for n in range(200)], 2) as results,
    ):
        list(results)
    assert len(list(tmp_path.iterdir())) < 100


def _fail_after_one(jobs):
    with workers.in_order(_mark, jobs, 2) as results:
        next(results)
        raise OSError("the disk is full")


def test_an_error_of_the_caller_cancels_those_that_wait(tmp_path):
    with pytest.raises(OSError, match="full"):
        _fail_after_one([(tmp_path, number) for number in range(100, 300)])
    assert len(list(tmp_path.iterdir())) < 100


PROGRAM = """
import os, sys, time
from vla_jax import refusal, workers

def make(number):
    os.write(1, b"%d\\n" % os.getpid())  # print would write the line in two parts
    time.sleep(float(sys.argv[2]))
    return bytes(int(sys.argv[1]))

if __name__ == "__main__":
    refusal.quiet_interrupt()
    with workers.in_order(make, range(2000), 2) as results:
        for result in results:
            pass
"""


# A pipe holds 64 KiB, so workers are mostly in the middle of a message of 30 MB when Ctrl-C comes.
@pytest.mark.parametrize(
    ("size", "seconds", "only_parent"),
    [(30_000_000, 0, False), (30_000_000, 0, True), (10, 20, False)],
    ids=["sending", "sending, only the parent gets it", "working"],
)
def test_ctrl_c_ends_all_at_once(tmp_path, size, seconds, only_parent):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [str(program), str(size), str(seconds)]
    process = start_in_foreground(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        children = {int(process.stdout.readline()) for _ in range(1 if seconds else 6)}
        send = os.kill if only_parent else os.killpg
        send(process.pid, signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, message
    assert message == "program.py: interrupted\n"
    assert not any(Path(f"/proc/{child}").exists() for child in children)
