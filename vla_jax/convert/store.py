"""Our own checkpoints, written and read one parameter at a time.

The layout is that of `train.checkpoint`, through Orbax. Two things keep host memory at about one
parameter: a type handler that makes each array when its turn comes, and storage in chunks, so that
compression never holds a second copy of a stacked tower.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vla_jax import rules
from vla_jax.config import FORMAT
from vla_jax.convert.tensors import Lazy
from vla_jax.models.weights import WeightError
from vla_jax.train import checkpoint, orbax_setup

STEP = 0
_CHUNK = 64 * 2**20  # bytes; also what a reader decodes at a time
_FILE = 256 * 2**20  # bytes buffered before a data file is closed; Orbax's default is 2 GiB


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Makes, writes and drops one array after the other; on disk they are plain numpy arrays."""

    def __init__(self, done: Callable[[Lazy], None]):
        # Each array is new and dropped after it is written: a copy would only take memory.
        super().__init__(deepcopy_host_arrays=False)
        self._done = done

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            array = value.read()
            if (array.shape, array.dtype) != (value.shape, value.dtype):
                raise ValueError(f"{info.name}: {array.shape} {array.dtype}, announced {value}")
            # A broken download or a run that diverged: all that the model says would be NaN.
            if not np.isfinite(array).all():
                raise WeightError(f"{info.name}: the weights hold numbers that are not finite")
            # Waiting here bounds host memory: the next array is made when this one is on disk.
            for future in await super().serialize([array], [info], [arg]):
                future.result()
            del array
            self._done(value)
        return []


def write(
    workdir: Path,
    leaves: Mapping[str, Lazy],
    meta: Mapping[str, Any],
    done: Callable[[Lazy], None] = lambda leaf: None,
) -> None:
    """Write step 0 of a new workdir: weights and what a policy needs, no optimizer state.

    Args:
        workdir: exists; has no checkpoints.
        leaves: our path -> parameter.
        meta: with the keys `checkpoint.META_KEYS`, JSON-serializable.
        done: called with each parameter written.

    Raises:
        ValueError: if `meta` lacks a key.
    """
    missing = [key for key in checkpoint.META_KEYS if key not in meta]
    if missing:
        raise ValueError(f"meta: missing {missing}")
    registry = ocp.type_handlers.create_type_handler_registry((Lazy, _LazyHandler(done)))
    handlers = {
        "params": orbax_setup.sealed(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)),
        "meta": orbax_setup.sealed(ocp.JsonCheckpointHandler()),
    }
    tree = rules.unflatten(leaves)
    args = ocp.args.Composite(
        params=ocp.args.PyTreeSave(  # type: ignore[call-arg]
            tree,
            save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree),
            ocdbt_target_data_file_size=_FILE,
        ),
        meta=ocp.args.JsonSave({"format": FORMAT, **meta}),  # type: ignore[call-arg]
    )
    # Synchronous, so that a failed write raises here and not in a background thread.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    folder = workdir.absolute() / checkpoint.FOLDER
    with ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as manager:
        manager.save(STEP, args=args)


class Stored:
    """A checkpoint's parameters, to be read one at a time.

    Attributes:
        step: the step that is read.
        meta: see `Checkpoints.meta`.
        leaves: our path -> parameter; reading gives a numpy array.
    """

    def __init__(self, workdir: str | Path, step: int | None = None):
        """Opens a run's workdir or its folder of checkpoints; reads no parameter.

        Raises:
            CheckpointError: nothing usable there.
        """
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            # A step whose optimizer state is damaged still has usable weights.
            step = checkpoints.intact(checkpoint.POLICY_ITEMS) if step is None else step
            self.meta = checkpoints.meta(step)
            self.step = checkpoints.steps()[-1] if step is None else step
            self._folder = checkpoints.directory / str(self.step) / "params"
        self._handler = ocp.PyTreeCheckpointHandler()
        with orbax_setup.whole_loops():
            metadata = self._handler.metadata(self._folder)  # type: ignore[arg-type]
        stored = rules.flatten(metadata.tree)  # type: ignore[arg-type]
        self.leaves = {
            path: Lazy(tuple(x.shape), np.dtype(x.dtype), self._reader(path))
            for path, x in stored.items()
        }

    def _reader(self, path: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # A tree of this leaf alone, so that Orbax reads no other parameter.
            item = rules.unflatten({path: 0})
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)  # type: ignore[call-arg]
            restored = self._handler.restore(self._folder, args=args)  # type: ignore[arg-type]
            return rules.flatten(restored)[path]

        return read
