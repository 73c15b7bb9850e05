"""How Orbax is set up for our four items; see `checkpoint` for what they are."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from vla_jax.train import checksum

_LEFT = 30.0  # seconds that reads and writes go on beside one that has failed


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that waits for what is still at work in it before it closes.

    Orbax reads and writes arrays side by side and closes its loop when the first of them fails. The
    others answer later, into a loop that is gone, which Python prints as an exception of nobody's;
    and those that write fill the disk while room is made for the next try.
    """

    def close(self) -> None:
        if not self.is_closed() and (left := asyncio.all_tasks(self)):
            # Not cancelled: what is given up may still answer. Some may wait for the one that has
            # failed.
            self.run_until_complete(asyncio.wait(left, timeout=_LEFT))
        super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> _Loop:
        return _Loop()


@contextlib.contextmanager
def whole_loops() -> Iterator[None]:
    """Around reads and writes by Orbax: what is done of them is done when it returns or fails."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def sealed(handler: Any) -> Any:
    """An Orbax handler that writes checksums when all of an item is there, before the rename."""
    finalize = handler.finalize

    def finalize_and_seal(directory: Any) -> None:
        finalize(directory)
        checksum.seal(os.fspath(directory))

    # On the object: Orbax finds a handler's arguments by its exact class.
    handler.finalize = finalize_and_seal
    return handler


def open_manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    """Orbax's manager of a folder of checkpoints.

    Args:
        directory: of the steps.
        keep: newest steps kept.
        read_only: nothing is created, removed or checked for leftovers.

    Raises:
        OSError: the folder cannot be made.
    """
    # Not Orbax's own read_only: it warns of itself at every opening.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
        # A folder that cannot be made is then an error of `save` itself; made in the background
        # it leaves Orbax's threads waiting for five minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    handlers = {
        "params": sealed(ocp.StandardCheckpointHandler()),
        "train": sealed(ocp.StandardCheckpointHandler()),
        "data": sealed(ocp.JsonCheckpointHandler()),
        "meta": sealed(ocp.JsonCheckpointHandler()),
    }
    return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)
