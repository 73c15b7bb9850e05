"""A folder for a model hub: weights, configuration, statistics, action units, model card.

The folder is made here in any case. It is sent to the hub where `huggingface_hub` and a token are
there; otherwise the error says what is missing and the command that sends it.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.convert import card, exporting, output, store
from vla_jax.convert.store import Stored
from vla_jax.convert.tensors import Lazy


class PushError(RuntimeError):
    """A folder that is ready and has not been sent."""


def write_checkpoint(
    stored: Stored,
    out: str | Path,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    done: Callable[[int], Any] = lambda count: None,
) -> None:
    """A folder that `vla serve` takes as it is: a checkpoint without its optimizer's state.

    Args:
        stored: the checkpoint.
        out: the new folder.
        dtype: of all parameters; None keeps each one's.
        overwrite: replace `out`.
        done: takes the bytes of each parameter written.

    Raises:
        OutputError: `out` is taken.
    """
    # The format is the writer's own to say.
    meta = {key: value for key, value in stored.meta.items() if key != "format"}
    leaves = {
        path: Lazy(leaf.shape, dtype, functools.partial(_read_as, leaf, dtype)) if dtype else leaf
        for path, leaf in stored.leaves.items()
    }
    with output.whole(out, overwrite) as folder:
        store.write(folder, leaves, meta, lambda leaf: done(leaf.nbytes))
        exporting.write_settings(folder, stored, stored.meta["config"])
        card.write(folder / card.FILE, stored, card.CHECKPOINT)


def _read_as(leaf: Lazy, dtype: np.dtype) -> np.ndarray:
    return leaf.read().astype(dtype, copy=False)


def upload(folder: str | Path, repo: str, private: bool = True) -> str:
    """Send a folder to a repository of the hub, which is made if it is not there.

    Args:
        folder: all of it is sent.
        repo: `USER/NAME`.
        private: whether only its owner sees a repository that is made here.

    Returns:
        The address of the repository.

    Raises:
        PushError: what is missing, or what the hub said, and the command that sends the folder.
    """
    command = f"hf upload {repo} {folder} ."
    try:
        # Not a requirement, because all else works without it.
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise PushError(
            "not sent, because huggingface_hub is not installed; "
            f"pip install huggingface_hub && hf auth login && {command}"
        ) from error
    if not hub.get_token():
        raise PushError(
            "not sent, because this machine has no token of the hub (HF_TOKEN, or hf auth login); "
            f"hf auth login && {command}"
        )
    try:
        # It may be there from an earlier push.
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=str(folder))
    # Whatever its HTTP client of the day raises: the folder is ready, and that has to be said.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise PushError(f"not sent, because of the hub: {reason}; {command}") from error
    return str(address)
