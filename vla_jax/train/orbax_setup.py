"""How Orbax is set up for our four items; see `checkpoint` for what they are."""

import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from vla_jax.train import checksum


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
