"""When a save fails: it is noticed at the next step, cleaned up after, and made again.

A disk that fills up is the common case. The run goes on meanwhile: a checkpoint that cannot be
written is a risk, a run that stops is a loss.
"""

import errno
import logging
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax

from vla_jax.train import checkpoint_folder
from vla_jax.train.checkpoint import Checkpoints, SaveError
from vla_jax.train.state import TrainState

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # between tries while a disk stays full


class Saver:
    """Saves the states of one run.

    Args:
        checkpoints: where to.
        meta: what every checkpoint carries, see `Checkpoints.save`.
    """

    def __init__(self, checkpoints: Checkpoints, meta: Mapping[str, Any]):
        self._checkpoints, self._meta = checkpoints, meta
        self._retry_at: float | None = None

    @property
    def last(self) -> int | None:
        """The newest complete step, None before the first."""
        return self._checkpoints.latest_step()

    def save(self, step: int, state: TrainState, data: Mapping[str, Any]) -> None:
        """Start to save a step; if that fails the run goes on and `check` tries again.

        Args:
            step: optimizer steps done.
            state: after that step.
            data: position of the loader after that step's batch.

        Raises:
            CheckpointError: trying again would not help.
        """
        self._retry_at = None
        try:
            self._checkpoints.save(step, state, data, self._meta)
        except SaveError as error:
            self._again(error, step, state, data)

    def check(self, step: int, state: TrainState, data: Mapping[str, Any]) -> None:
        """Learn whether the save in progress has failed; then save this newer step instead.

        Call it after every step; takes what `save` takes, and raises what it raises.
        """
        try:
            self._checkpoints.poll()
        except SaveError as error:
            self._again(error, step, state, data)
        if self._retry_at is not None and time.monotonic() > self._retry_at:
            self.save(step, state, data)

    def finish(self, step: int, state: TrainState, data: Mapping[str, Any]) -> None:
        """Save the last step and wait until it is on the disk.

        Raises:
            CheckpointError: it cannot be saved; the message says which step was saved last.
        """
        self.save(step, state, data)
        try:
            self._checkpoints.wait()
        except SaveError as error:
            self._again(error, step, state, data)
        if self._retry_at is not None:
            last = self._checkpoints.latest_step()
            raise SaveError(
                f"{self._checkpoints.directory / str(step)}: could not be saved; the last "
                f"checkpoint is that of step {last}. Make room, then give the same command again"
            )

    def _again(
        self, error: SaveError, step: int, state: TrainState, data: Mapping[str, Any]
    ) -> None:
        """Clean up and try as long as there is something to gain from it."""
        if jax.process_count() > 1:  # the others would have to try at the same step
            raise error
        tries, problem = 0, error
        while self._make_room(problem, tries):
            tries += 1
            try:
                self._checkpoints.save(step, state, data, self._meta)
                self._checkpoints.wait()
            except SaveError as failure:
                problem = failure
                continue
            logger.warning("saved step %d after all", step)
            self._retry_at = None
            return
        # Waiting helps only where somebody else may make room.
        if not self._is_full(problem):
            raise problem
        logger.warning("training goes on; the next try to save is in %.0f s", RETRY_SECONDS)
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _make_room(self, error: SaveError, tries: int) -> bool:
        """Remove what the failed save left, then older steps one by one; whether to try again."""
        logger.warning("%s", error)
        # Before the leftovers go, which may be what fills the disk.
        is_full = self._is_full(error)
        self._checkpoints.reopen()
        if tries == 0:
            return True  # what it left may have been all that was in the way
        steps = self._checkpoints.steps()
        # The only good checkpoint is never removed.
        if not is_full or len(steps) < 2:
            return False
        logger.warning("the disk is full: removing step %d, keeping step %d", steps[0], steps[-1])
        self._checkpoints.delete(steps[0])
        return True

    def _is_full(self, error: SaveError) -> bool:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("No space left", "quota exceeded")):
            return True
        directory, last = self._checkpoints.directory, self._checkpoints.latest_step()
        if last is None or not directory.is_dir():
            return False
        # Some file systems report a full disk as another error, so compare the sizes.
        needed = checkpoint_folder.size_of(directory / str(last))
        return shutil.disk_usage(directory).free < needed
