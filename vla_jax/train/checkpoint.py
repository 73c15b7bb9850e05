"""Checkpoints: everything a run needs to go on, and everything a policy needs to act.

One folder a step, `WORKDIR/checkpoints/STEP`, with four items:
    params  nested dict, trainable float32 and frozen bfloat16: all that serving loads; the
            averaged ones where the run keeps an average
    train   optimizer state, step number, random key; beside an average also the weights of the
            last step, from which training goes on
    data    position of the sample stream (JSON)
    meta    config, normalization statistics, action specs, tokenizer, format version (JSON)
Orbax writes beside and renames, in the background; a run killed while saving resumes from the
step before. Arrays are stored whole, so any mesh can read what any other wrote. Each item carries
checksums of its files, and nothing is read that does not have them.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from vla_jax import rules
from vla_jax.config import FORMAT, ConfigError, upgrade
from vla_jax.train import checkpoint_folder, checksum, orbax_setup
from vla_jax.train.checkpoint_folder import FOLDER, CheckpointError, DamagedError, SaveError
from vla_jax.train.finite import all_finite
from vla_jax.train.inspection import Inspection
from vla_jax.train.state import TrainState, misfits, place_parts

__all__ = ["FOLDER", "CheckpointError", "Checkpoints", "DamagedError", "SaveError"]

logger = logging.getLogger(__name__)

ITEMS = ("params", "train", "data", "meta")
# Imported weights have these alone: enough to act and to start a run from, not to go on with one.
POLICY_ITEMS = ("params", "meta")
META_KEYS = tuple(checkpoint_folder.META_KINDS)
# What Orbax raises for a disk, a folder or a file that it cannot work with.
_FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError)


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
        self.directory = checkpoint_folder.locate(workdir, read_only)
        self._keep, self._read_only = keep, read_only
        self._inspection = Inspection(self.directory, alone=read_only)
        self._saving: int | None = None  # the step that is being written
        with contextlib.ExitStack() as stack:
            # As long as anything is read or written, which Orbax's own threads do, too.
            stack.enter_context(orbax_setup.whole_loops())
            self._manager = self._open()
            if not read_only and self.latest_step() == 0:
                raise CheckpointError(
                    f"{self.directory}: holds imported weights, no run; start one from them with "
                    "--init and another --workdir"
                )
            self._loops = stack.pop_all()

    def _open(self) -> ocp.CheckpointManager:
        try:
            return orbax_setup.open_manager(self.directory, self._keep, self._read_only)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: {error.strerror or error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            self.close()
        except SaveError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # what ends the run is the news

    def close(self) -> None:
        """Wait for the save in progress and release the folder.

        Raises:
            SaveError: that save failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            self._loops.close()

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    def save(
        self, step: int, state: TrainState, data: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Start writing a step; returns once the arrays are copied off the devices.

        Args:
            step: optimizer steps done; saving a step twice is one save.
            state: of the run; its buffers may be donated as soon as this returns.
            data: state of the loader after exactly `step` batches.
            meta: with the keys `META_KEYS`, JSON-serializable.

        Raises:
            ValueError: if `meta` lacks a key.
            CheckpointError: numbers of the state are not finite, or the folder is gone.
            SaveError: this save cannot begin, or the one before has failed.
        """
        missing = [key for key in META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"meta: missing {missing}; a policy could not act without them")
        self.wait()
        if step in self._manager.all_steps():
            return
        if not bool(_all_finite((state.trainable, state.ema, state.opt_state))):
            raise CheckpointError(
                f"step {step}: weights or moments are not finite although the losses were; they "
                f"are not saved. The last good checkpoint is that of step {self.latest_step()}: "
                "lower optim.learning_rate, or optim.weight_decay, and go on from there"
            )
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory}: the folder was removed while the run was writing to it; "
                f"step {step} is not saved"
            )
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.averaged),  # type: ignore[call-arg]
            train=ocp.args.StandardSave(_train_item(state)),  # type: ignore[call-arg]
            data=ocp.args.JsonSave(dict(data)),  # type: ignore[call-arg]
            meta=ocp.args.JsonSave({"format": FORMAT, **meta}),  # type: ignore[call-arg]
        )
        self._saving = step
        try:
            self._manager.save(step, args=args, force=True)
        except _FAILURES as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Block until the save in progress is on disk.

        Raises:
            SaveError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except _FAILURES as error:
            raise self._failed(error) from error
        self._saving = None

    def poll(self) -> None:
        """Learn of the save in progress without waiting for it.

        Raises:
            SaveError: it has failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def _failed(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        reason = checkpoint_folder.first_line(error)
        return SaveError(f"{self.directory / str(step)}: could not be saved: {reason}")

    def reopen(self) -> None:
        """After a save that failed: remove what it left, and list the steps anew."""
        self._manager.close()
        checkpoint_folder.remove_leftovers(self.directory)
        self._manager = self._open()

    def delete(self, step: int) -> None:
        """Remove a step, to make room."""
        self._manager.delete(step)

    def intact(self, items: Sequence[str] = ITEMS) -> int | None:
        """The newest step of which these items are as they were written; None if there is none.

        Newer ones that are damaged are named in a warning. A run puts them aside, to
        `WORKDIR/damaged`, so that it can write these steps again; all processes must ask.
        """
        for step in reversed(self.steps()):
            problems = self.damage(step, items)
            if not problems:
                return step
            folder, listing = self.directory / str(step), "; ".join(problems[:5])
            if self._read_only:
                logger.warning("%s: damaged, not used: %s", folder, listing)
                continue
            moved: Path | str = "WORKDIR/damaged"
            if jax.process_index() == 0:
                moved = checkpoint_folder.put_aside(folder)
            logger.warning("%s: damaged, put aside as %s: %s", folder, moved, listing)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"vla_jax_damaged_{step}")
            self._inspection.forget(step, items)
            self._manager.reload()  # it still lists the step that is gone
        return None

    def damage(self, step: int, items: Sequence[str]) -> list[str]:
        """What is wrong with these items of a step, one line each; [] if nothing is.

        The processes of a run share the reading, and all must ask; tools read everything.
        """
        return self._inspection.problems(step, items)

    def restore(
        self, template: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """State and loader state of a step (the newest by default).

        Args:
            template: shapes, dtypes and the shardings wanted now, as `state.abstract` gives.
            step: which.

        Raises:
            CheckpointError: if there is none, it is damaged, or its parameters do not fit the
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
        items = self._read(
            step,
            params=ocp.args.StandardRestore(params),  # type: ignore[call-arg]
            train=ocp.args.StandardRestore(wanted),  # type: ignore[call-arg]
            data=ocp.args.JsonRestore(),
        )
        parts = place_parts(items["params"], template)  # the average, where one is kept
        state = TrainState(
            step=items["train"]["step"],
            trainable=items["train"].get("trainable", parts.trainable),
            frozen=parts.frozen,
            ema=parts.trainable if template.ema else {},
            opt_state=items["train"]["opt_state"],
            rng=jax.random.wrap_key_data(items["train"]["rng"]),
        )
        return state, items["data"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Config, statistics, action specs and tokenizer of a step (the newest by default).

        What an earlier version stored is brought to this version's format.

        Raises:
            CheckpointError: if there is none, it is damaged, or of another format.
        """
        step = self._resolve(step, ("meta",))
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
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
        step = self._resolve(step, ("params",))
        stored = self._check_params(step, template)
        if template is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            template = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
            )
        return self._read(step, params=ocp.args.StandardRestore(template))["params"]  # type: ignore[call-arg]

    def _read(self, step: int, **items: Any) -> Any:
        folder = self.directory / str(step)
        unsealed = [item for item in items if not checksum.is_sealed(folder / item)]
        if unsealed:
            logger.info("%s: %s have no checksums, by an earlier version", folder, unsealed)
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _stored(self, step: int, item: str) -> Any:
        """Shapes and dtypes of an item, as the tree it is."""
        with self._reading(step):
            metadata = self._manager.item_metadata(step)[item]
        return getattr(metadata, "tree", metadata)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax's for an array cut off is of no narrower type
            reason, folder = checkpoint_folder.first_line(error), self.directory / str(step)
            text = f"{folder}: cannot be read: {reason}. {self._way_out(step)}"
            raise DamagedError(text) from error

    def _way_out(self, step: int) -> str:
        others = [other for other in reversed(self.steps()) if other != step]
        whole = next((other for other in others if not self.damage(other, POLICY_ITEMS)), None)
        if whole is not None:
            return f"Move the folder away to go on from step {whole}"
        return "All other steps are damaged, too" if others else "There is no other step beside it"

    def _resolve(self, step: int | None, items: Sequence[str] = POLICY_ITEMS) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: holds no complete checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no step {step}; there are {steps}")
        step = steps[-1] if step is None else step
        problems = self.damage(step, items)
        folder = self.directory / str(step)
        if problems and not (folder / "train").exists() and not self.damage(step, POLICY_ITEMS):
            raise CheckpointError(f"{folder}: weights alone, without 'train': no run to go on with")
        if problems:
            listing = "; ".join(problems[:5])
            raise DamagedError(f"{folder}: damaged: {listing}. {self._way_out(step)}")
        return step

    def _check_average(self, step: int, template: TrainState) -> bool:
        stored = "trainable" in self._stored(step, "train")
        if stored != bool(template.ema):
            has, wants = ("an", "does not") if stored else ("no", "does")
            raise CheckpointError(
                f"{self.directory / str(step)}: holds {has} average of the weights, and the run "
                f"{wants} keep one; optim.ema_decay cannot be switched on or off within a run"
            )
        return stored

    def _check_params(self, step: int, wanted: Mapping[str, Any] | None) -> dict[str, Any]:
        stored = self._stored(step, "params")
        if wanted is None:
            return stored
        problems = misfits(rules.flatten(stored), rules.flatten(wanted))
        if problems:
            listing = "\n  ".join(problems)
            raise CheckpointError(
                f"{self.directory / str(step)}: {len(problems)} parameters do not fit the "
                f"model:\n  {listing}"
            )
        return stored


_all_finite = jax.jit(all_finite)


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
