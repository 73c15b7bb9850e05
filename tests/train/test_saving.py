"""Saves that fail: noticed at the next step, cleaned up after, made again."""

import asyncio
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.train.test_checkpoint import META
from tests.train.test_step import set_up
from vla_jax.train import checksum, saving
from vla_jax.train.checkpoint import CheckpointError, Checkpoints, SaveError
from vla_jax.train.saving import Saver


class Disk:
    """Lets so many checkpoints be whole; then the disk is full until some are removed."""

    def __init__(self, monkeypatch, directory: Path, room: int):
        self.directory, self.room, self.refused = directory, room, 0
        self._seal = checksum.seal
        monkeypatch.setattr(checksum, "seal", self.seal)

    def seal(self, folder: str) -> None:
        steps = [path for path in self.directory.iterdir() if path.name.isdigit()]
        if len(steps) >= self.room and folder.endswith("params.orbax-checkpoint-tmp"):
            self.refused += 1
            raise OSError(28, "No space left on device")
        self._seal(folder)


@pytest.fixture
def state():
    return set_up((1, 1, 1))[-1]


def wait_for_disk(checkpoints: Checkpoints) -> None:
    while checkpoints._manager.is_saving_in_progress():
        pass


def test_a_full_disk_is_noticed_at_the_next_step_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog, state
):
    disk = Disk(monkeypatch, tmp_path / "checkpoints", room=2)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        saver = Saver(checkpoints, META)
        for step in (10, 20, 30):
            saver.save(step, state, {"samples": step})
            wait_for_disk(checkpoints)
        assert checkpoints.steps() == [10, 20]
        saver.check(31, state, {"samples": 31})
        assert checkpoints.steps() == [20, 31]
        saver.finish(40, state, {"samples": 40})
        assert checkpoints.steps() == [31, 40]
        assert checkpoints.intact() == 40
    assert disk.refused == 2 * 2  # each failed once more with the leftovers removed alone
    assert "30: could not be saved: [Errno 28] No space left on device" in caplog.text
    assert "the disk is full: removing step 10, keeping step 20" in caplog.text
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_the_last_checkpoint_is_never_removed_and_tries_go_on(tmp_path, monkeypatch, caplog, state):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    disk = Disk(monkeypatch, tmp_path / "checkpoints", room=1)
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints, META)
        saver.save(10, state, {})
        saver.save(20, state, {})
        wait_for_disk(checkpoints)
        saver.check(21, state, {})
        assert checkpoints.steps() == [10]
        assert "training goes on; the next try" in caplog.text
        with pytest.raises(SaveError, match=r"22: could not be saved; the last checkpoint .* 10"):
            saver.finish(22, state, {})
        disk.room = 3
        saver.check(23, state, {})  # somebody has made room
        checkpoints.wait()
        assert checkpoints.steps() == [10, 23]


def test_what_no_room_would_help_ends_the_run_with_the_reason(tmp_path, monkeypatch, state, caplog):
    caplog.set_level(logging.WARNING)
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints, META)
        saver.save(1, state, {})
        checkpoints.wait()

        def broken(folder: str) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(checksum, "seal", broken)
        with pytest.raises(SaveError, match=r"2: could not be saved: .*Input/output error"):
            saver.finish(2, state, {})
        assert checkpoints.steps() == [1]
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(CheckpointError, match="the folder was removed while the run was"):
            saver.finish(3, state, {})


def test_what_is_written_beside_a_failed_write_ends_with_it(tmp_path):
    # Else it fills the disk while room is made for the next try.
    written = []

    async def fail():
        raise ValueError("no space")

    async def write():
        await asyncio.sleep(0.05)
        written.append("array")

    async def both():
        await asyncio.gather(fail(), write())

    def in_the_background():  # as Orbax's threads run what they write
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(both())
        finally:
            loop.close()

    before = asyncio.get_event_loop_policy()
    with Checkpoints(tmp_path), ThreadPoolExecutor(1) as pool:
        error = pool.submit(in_the_background).exception()
        assert isinstance(error, ValueError)
        assert written == ["array"]
    assert asyncio.get_event_loop_policy() is before
