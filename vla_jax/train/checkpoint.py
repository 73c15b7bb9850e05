"""Checkpoints: everything a run needs to go on, and everything a policy needs to act.

One folder a step, `WORKDIR/checkpoints/STEP`, with four items:
    params  nested dict, trainable float32 and frozen bfloat16: all that serving loads; the
            averaged ones where the run keeps an average
    train   optimizer state, step number, random key; beside an average also the weights of the
            last step, from which training goes on
    data    position of the sample stream (JSON)
    meta    config, normalisation statistics, action specs, tokenizer, format version (JSON)
Orbax writes beside and renames, in the background; a run killed while saving resumes from the
step before. Arrays are stored whole, so any mesh can read what any other wrote.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from vla_jax import rules
from vla_jax.config import FORMAT, ConfigError, upgrade
from vla_jax.train.state import TrainState, place_parts

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
ITEMS = ("params", "train", "data", "meta")
# Imported weights have these alone: enough to act and to start a run from, not to go on with one.
POLICY_ITEMS = ("params", "meta")
META_KEYS = ("config", "statistics", "action_specs", "tokenizer")


class CheckpointError(RuntimeError):
    """A checkpoint folder that cannot be used; the message says which and why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        workdir: of the run; they live in its subfolder `checkpoints`.
        keep: newest steps kept.
        read_only: for tools and serving: nothing is created, removed or checked for leftovers.

    Raises:
        CheckpointError: if the folder holds something else, or imported weights and is not
            `read_only`.
    """

    def __init__(self, workdir: str | Path, keep: int = 3, read_only: bool = False):
        self.directory = _locate(workdir, read_only)
        # Not Orbax's own read_only: it warns of itself at every opening.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, item_handlers=handlers, options=options
        )
        if not read_only and self.latest_step() == 0:
            raise CheckpointError(
                f"{self.directory}: holds imported weights, no run; start one from them with "
                "--init and another --workdir"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save in progress and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, data: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Start writing a step; returns once the arrays are copied off the devices.

        Args:
            step: optimizer steps done; saving a step twice is one save.
            state: of the run; its buffers may be donated as soon as this returns.
            data: state of the loader after exactly `step` batches.
            meta: with the keys `META_KEYS`, JSON-serialisable.

        Raises:
            ValueError: if `meta` lacks a key.
        """
        missing = [key for key in META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"meta: missing {missing}; a policy could not act without them")
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.averaged),  # type: ignore[call-arg]
            train=ocp.args.StandardSave(_train_item(state)),  # type: ignore[call-arg]
            data=ocp.args.JsonSave(dict(data)),  # type: ignore[call-arg]
            meta=ocp.args.JsonSave({"format": FORMAT, **meta}),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Block until the save in progress is on disk."""
        self._manager.wait_until_finished()

    def restore(
        self, template: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """State and loader state of a step (the newest by default).

        Args:
            template: shapes, dtypes and the shardings wanted now, as `state.abstract` gives.
            step: which.

        Raises:
            CheckpointError: if there is none, it is incomplete, or its parameters do not fit the
                template; all differences are named.
        """
        step = self._resolve(step, ITEMS)
        params = template.params
        self._check_params(step, params)
        key = jax.eval_shape(jax.random.key_data, template.rng)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=template.rng.sharding)
        wanted = {"opt_state": template.opt_state, "step": template.step, "rng": key}
        if self._check_average(step, template):
            wanted["trainable"] = template.trainable
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),  # type: ignore[call-arg]
                train=ocp.args.StandardRestore(wanted),  # type: ignore[call-arg]
                data=ocp.args.JsonRestore(),
            ),
        )
        parts = place_parts(found["params"], template)
        state = TrainState(
            step=found["train"]["step"],
            trainable=found["train"].get("trainable", parts.trainable),
            frozen=parts.frozen,
            ema=parts.trainable if template.ema else {},
            opt_state=found["train"]["opt_state"],
            rng=jax.random.wrap_key_data(found["train"]["rng"]),
        )
        return state, found["data"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Config, statistics, action specs and tokenizer of a step (the newest by default).

        What an earlier version stored is brought to this version's format.

        Raises:
            CheckpointError: if there is none, it is incomplete, or of another format.
        """
        step = self._resolve(step)
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args)["meta"]
        try:
            config = upgrade(
                meta.get("config"), meta.get("format"), str(self.directory / str(step))
            )
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        return {**meta, "format": FORMAT, "config": config}

    def params(
        self, step: int | None = None, template: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Parameters alone, as a nested dict.

        Args:
            step: which; None is the newest.
            template: nested dict of ShapeDtypeStruct: dtypes to cast to and shardings to place
                by; None keeps the stored dtypes and uses the first local device.

        Raises:
            CheckpointError: see `restore`.
        """
        step = self._resolve(step)
        stored = self._check_params(step, template)
        if template is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            template = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
            )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(template))  # type: ignore[call-arg]
        return self._manager.restore(step, args=args)["params"]

    def _resolve(self, step: int | None, items: tuple[str, ...] = POLICY_ITEMS) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: holds no complete checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no step {step}; there are {steps}")
        step = steps[-1] if step is None else step
        folder = self.directory / str(step)
        missing = [item for item in items if not (folder / item).is_dir()]
        if missing and not set(missing) & set(POLICY_ITEMS):
            raise CheckpointError(
                f"{folder}: weights alone, without {missing}: no run to go on with"
            )
        if missing:
            raise CheckpointError(
                f"{folder}: incomplete, lacks {missing}. It was copied in part or is not of "
                "vla_jax; remove the folder to fall back to an earlier step"
            )
        return step

    def _check_average(self, step: int, template: TrainState) -> bool:
        metadata = self._manager.item_metadata(step)["train"]
        stored = "trainable" in getattr(metadata, "tree", metadata)
        if stored != bool(template.ema):
            has, wants = ("an", "does not") if stored else ("no", "does")
            raise CheckpointError(
                f"{self.directory / str(step)}: holds {has} average of the weights, and the run "
                f"{wants} keep one; optim.ema_decay cannot be switched on or off within a run"
            )
        return stored

    def _check_params(self, step: int, wanted: Mapping[str, Any] | None) -> dict[str, Any]:
        metadata = self._manager.item_metadata(step)["params"]
        stored = getattr(metadata, "tree", metadata)
        if wanted is None:
            return stored
        have, want = rules.flatten(stored), rules.flatten(wanted)
        problems = [f"missing in the checkpoint: {path}" for path in want if path not in have]
        problems += [f"not in the model: {path}" for path in have if path not in want]
        problems += [
            f"shape of {path}: {tuple(have[path].shape)} stored, {want[path].shape} in the model"
            for path in want
            if path in have and tuple(have[path].shape) != tuple(want[path].shape)
        ]
        if problems:
            listing = "\n  ".join(problems)
            raise CheckpointError(
                f"{self.directory / str(step)}: {len(problems)} parameters do not fit the "
                f"model:\n  {listing}"
            )
        return stored


def resumable_meta(workdir: str | Path) -> dict[str, Any]:
    """`Checkpoints.meta` of the run in a workdir; {} if there is none to go on with.

    Raises:
        CheckpointError: there is one that cannot be used.
    """
    if not (Path(workdir) / FOLDER).is_dir():
        return {}
    with Checkpoints(workdir, read_only=True) as checkpoints:
        # Step 0 is imported weights, which no run has written.
        return checkpoints.meta() if checkpoints.latest_step() else {}


def load_meta(workdir: str | Path, step: int | None = None) -> dict[str, Any]:
    """`Checkpoints.meta` of a run that is not being trained here."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.meta(step)


def load_params(
    workdir: str | Path, step: int | None = None, template: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`Checkpoints.params` of a run that is not being trained here."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.params(step, template)


def _train_item(state: TrainState) -> dict[str, Any]:
    key = jax.random.key_data(state.rng)
    item = {"opt_state": state.opt_state, "step": state.step, "rng": key}
    return {**item, "trainable": state.trainable} if state.ema else item


def _locate(workdir: str | Path, read_only: bool) -> Path:
    workdir = Path(workdir).absolute()
    directory = workdir / FOLDER
    if read_only and not directory.is_dir():
        # The folder of checkpoints itself will do.
        if not workdir.is_dir():
            raise CheckpointError(f"{workdir}: no such folder")
        if not any(child.name.isdigit() for child in workdir.iterdir()):
            raise CheckpointError(f"{workdir}: holds neither {FOLDER}/ nor numbered steps")
        directory = workdir
    if directory.is_dir():
        foreign = sorted(c.name for c in directory.iterdir() if not _ours(c.name))
        if foreign:
            raise CheckpointError(
                f"{directory}: holds {foreign[:5]}, which are not checkpoints of vla_jax; choose "
                "another --workdir"
            )
    return directory


def _ours(name: str) -> bool:
    return name.isdigit() or "orbax" in name or name == "metadata" or name.startswith((".", "_"))
