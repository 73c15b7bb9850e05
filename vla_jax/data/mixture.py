"""All datasets of a run, opened together: windows, instructions, statistics, action specs."""

import contextlib
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_jax.config import ConfigError, DataConfig, DatasetConfig, StructureConfig
from vla_jax.data.chunk_units import units_of, with_chunks
from vla_jax.data.dataset import Dataset, Part, open_dataset
from vla_jax.data.errors import DataError, FeatureError, MissingCameraError, Skips
from vla_jax.data.filters import make_filters
from vla_jax.data.find_spec import find_spec, short_name
from vla_jax.data.formats import Reader, find_reader, to_folder
from vla_jax.data.given import given_reader
from vla_jax.data.language.instructions import Instructions
from vla_jax.data.spec import DatasetSpec
from vla_jax.data.units.clipping import check_clipping
from vla_jax.data.units.foreign_statistics import read_statistics
from vla_jax.data.units.gripper import targets
from vla_jax.data.units.lost_motion import lost_motion, unpadded
from vla_jax.data.units.normalize import ActionSpec, StateSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.statistics import cached_statistics

_PARTS = ("train", "val")
log = logging.getLogger(__name__)


class Mixture:
    """Opened datasets and the shape of the windows that are drawn from them.

    Attributes:
        datasets: see `vla_jax.data.dataset.Dataset`; actions are normalized.
        names: of the datasets; `Batch.dataset` indexes it.
        weights: of one window of each.
        sizes: windows of each.
        num_windows: their sum.
        instructions: every distinct text a sample may be told, sorted.
        statistics: name -> statistics of the train part, in openvla's schema.
        action_specs: name -> how model outputs become that robot's actions.
        units: name -> its units where `data.units` names a rule; its actions and states are then
            as recorded, and the loader brings each chunk to the model's.
        window, chunk, cameras, proprio: of the model's structure.
        image_sizes: camera -> (height, width) of the batch's images.
        windows: of each dataset, see `vla_jax.data.windows.Windows`.
        language: what a sample is told; its codes index `instructions`.
        random_goal, padded_rows, pool: see the same names in `data`.
        block: samples over which the shares come out even.
        digest: changes when the windows or their order would.
        content: changes when the recorded numbers would, in files of the same names and sizes.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        statistics: Mapping[str, Any],
        action_specs: Mapping[str, ActionSpec],
        structure: StructureConfig,
        config: DataConfig,
        train: bool,
        image_size: tuple[int, int] | None,
        units: Mapping[str, PolicyUnits] | None = None,
    ):
        """Joins opened datasets; see `open_datasets`."""
        self.datasets, self.weights = list(datasets), [float(w) for w in weights]
        self.names = [dataset.name for dataset in datasets]
        self.statistics, self.action_specs = dict(statistics), dict(action_specs)
        self.units = dict(units or {})
        self.window, self.chunk, self.proprio = structure.window, structure.chunk, structure.proprio
        self.cameras, self.block = tuple(structure.cameras), config.block
        self.pool = config.pool
        parity = config.parity
        self.random_goal, self.padded_rows = parity.random_goal and train, parity.padded_rows
        segment = parity.windows == "segment"
        self.windows = [d.windows(self.window, parity.left_pad, segment) for d in datasets]
        self.sizes = [len(windows) for windows in self.windows]
        self.num_windows = sum(self.sizes)
        self.language = Instructions(datasets, config.language, train)
        self.instructions = self.language.texts
        self.image_sizes = {c: _canvas(c, datasets, image_size) for c in self.cameras}
        empty = [name for name, size in zip(self.names, self.sizes, strict=True) if not size]
        if empty:
            raise DataError(
                f"{empty}: no window is left: no trajectory is as long as the window {self.window}"
                " or data.filters.noop leaves nothing"
            )
        # All that decides which window has which number.
        identity = [
            [[d.name, d.index.digest, d.starts.tolist(), d.digest] for d in datasets],
            [self.weights, self.sizes, self.window, parity.left_pad, segment, self.block],
        ]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        contents = json.dumps([d.index.content for d in datasets])
        self.content = hashlib.sha256(contents.encode()).hexdigest()


def open_datasets(
    config: DataConfig,
    structure: StructureConfig,
    action_dim: int,
    split: Literal["train", "val"],
    *,
    statistics: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    trajectories: Mapping[str, Any] | None = None,
) -> Mixture:
    """Opens every dataset of a config, indexing those that are not indexed yet.

    Args:
        config: the data section.
        structure: gives window, chunk and cameras.
        action_dim: numbers of an action, a gripper's included.
        split: "train", or "val": `config.val_split` where a dataset has it, else the last
            `config.val_fraction` of its train trajectories (which "train" then leaves out).
        statistics: of the train part, when already at hand (from a checkpoint or the train
            mixture); otherwise computed, for "val" too.
        image_size: (height, width) of the images where the datasets of the mixture disagree.
        trajectories: name of a dataset -> its trajectories, such as a `dlimp.DLataset`, to be
            streamed in place of what its folder holds; see `vla_jax.data.given`.

    Raises:
        ConfigError: an unknown spec, or statistics without a dataset of the mixture.
        DataError: anything wrong with the data; see `vla_jax.data.errors`. With `data.on_error` =
            skip that part is left out, or if a feature is missing the dataset, unless none is left.
    """
    names, streamed = _names(config.datasets), trajectories or {}
    unknown = sorted(set(streamed) - set(names))
    if unknown:
        raise ConfigError(f"trajectories are given for {unknown}; the datasets are {names}")
    filters = {part: make_filters(config.filters, names, part == "train") for part in _PARTS}
    specs = _specs(config.datasets, config.parity.variant)
    # Statistics from the caller come first: they are those the model was trained with.
    if statistics is None and config.statistics:
        statistics = read_statistics(config.statistics, names)
    if split == "train":
        _warn_of(config)
    missing = [name for name in names if statistics is not None and name not in statistics]
    left_out = Skips("data.datasets", config.on_error)
    if missing and not left_out.allowed:
        available = sorted(statistics or {})
        raise ConfigError(f"the statistics lack {missing}; they have {available}")
    measured: dict[str, Any] = {}
    action_specs, datasets, weights, units = {}, [], [], {}
    for name, spec, entry in zip(names, specs, config.datasets, strict=True):
        if name in missing:  # the run that the statistics are of has left it out, too
            left_out.add(DataError(f"there are no statistics of {name}", entry.dir))
            continue
        streamed_reader = given_reader(streamed[name]) if name in streamed else None
        reader: Reader = streamed_reader or find_reader(
            entry.dir, config.reader, check_crc=config.index == "verify"
        )
        sources = _sources(entry, config, reader)

        # Opened when called, as often one part of the two is enough.
        opened = {
            which: functools.partial(
                open_dataset,
                name,
                spec,
                entry.dir,
                source,
                structure.cameras,
                action_dim,
                part=part,
                held_out=config.val_fraction,
                cache_dir=config.cache_dir,
                rebuild=config.index != "auto",
                filters=filters[which][name],
                skips=Skips(name, config.on_error, config.max_skipped),
                reader=reader,
            )
            for which, (source, part) in sources.items()
        }
        try:
            # Without statistics "val" needs the train part too, to measure it.
            dataset = opened["train" if statistics is None else split]()
        except FeatureError as error:
            left_out.add(error)
            continue
        if statistics is not None:
            measured[name] = statistics[name]
        else:
            parts: list[Dataset] = [dataset]
            held_out = config.val_fraction or sources["val"][1] == "all"
            # Some projects measure over what they hold out, too.
            if config.parity.stats_split == "all" and held_out:
                parts.append(opened["val"]())
            # Trajectories in memory have no folder that a cache could lie beside.
            folder = None if name in streamed else to_folder(entry.dir)
            measured[name] = _measure(parts, spec.mask(action_dim), folder, config)
            dataset = opened["val"]() if split == "val" else dataset
        noop = config.filters.noop or spec.noop
        # Before normalizing: the threshold is in the dataset's own units.
        if noop:
            dataset.leave_out_idle(noop, structure.chunk)
        measured[name] = _fitted(name, measured[name], action_dim, structure.proprio)
        action_specs[name] = _action_spec(name, measured[name], config, spec)
        # Also before: recorded actions are compared with what the model is shown.
        if split == "train":
            _warn_of_lost_motion(dataset, measured[name], action_specs[name], structure.proprio)
            check_clipping(name, dataset.actions, action_specs[name])
        dataset.fast_dct = config.parity.dct == "fast"
        # The loader scales chunk by chunk, so actions and states stay as recorded.
        if config.units:
            measured[name] = with_chunks(measured[name], dataset, structure, config)
            units[name] = units_of(name, measured[name], spec, structure, config)
            datasets.append(dataset)
            weights.append(entry.weight)
            continue
        dataset.normalize(action_specs[name])
        if spec.has_gripper:
            gripper = dataset.actions[:, -1]  # a view: what follows changes the actions
            gripper[:] = targets(gripper, spec.gripper_binary, config.parity.gripper)
            if config.parity.constant_to_zero and _is_constant(measured[name]["action"]):
                gripper[:] = 0
        dataset.proprio = _states(name, measured[name], dataset.proprio, structure.proprio)
        datasets.append(dataset)
        weights.append(entry.weight)
    if not datasets:
        causes = "\n  ".join(left_out.causes())
        raise DataError(f"no dataset is left of {names}: {left_out}\n  {causes}")
    return Mixture(
        datasets, weights, measured, action_specs, structure, config, split == "train", image_size,
        units,
    )  # fmt: skip


def _warn_of(config: DataConfig) -> None:
    """Tells of choices that are legal and seldom meant."""
    if config.normalization == "q99" and config.clip < 1:
        log.warning(
            "data.clip = %s cuts actions that q99 has already cut at its quantiles", config.clip
        )
    if config.normalization == "normal" and config.clip < 2:
        log.warning(
            "data.normalization = normal with data.clip = %s cuts actions that lie further than "
            "that many standard deviations from the mean", config.clip,
        )  # fmt: skip


def _measure(
    parts: Sequence[Dataset], mask: Sequence[bool], folder: str | Path | None, config: DataConfig
) -> dict[str, Any]:
    """Statistics over the actions and states of all parts of a dataset."""
    states = [part.proprio for part in parts if part.proprio is not None]
    return cached_statistics(
        parts[0].name,
        # A single part is not copied, as its actions may fill gigabytes.
        np.concatenate([part.actions for part in parts]) if parts[1:] else parts[0].actions,
        np.concatenate(states) if states[1:] else parts[0].proprio,
        sum(len(part.lengths) for part in parts),
        mask,
        folder if isinstance(folder, Path) else None,
        config.cache_dir,
        config.index != "auto",
    )


def _fitted(name: str, entry: Mapping[str, Any], action_dim: int, states: int) -> dict[str, Any]:
    """One dataset's statistics, held against the sizes of the model.

    Raises:
        ConfigError: they are of actions of another size.
    """
    # openpi pads its statistics with zeros.
    fitted = {**entry, "action": unpadded(entry["action"], action_dim)}
    if states and entry.get("proprio"):
        fitted["proprio"] = unpadded(entry["proprio"], states)
    sizes = {key: len(values) for key, values in fitted["action"].items()}
    if set(sizes.values()) != {action_dim}:
        raise ConfigError(
            f"data.statistics: {name!r}: they are of actions of {max(sizes.values())} numbers, the "
            f"model takes {action_dim}"
        )
    return fitted


def _action_spec(
    name: str, entry: Mapping[str, Any], config: DataConfig, spec: DatasetSpec
) -> ActionSpec:
    try:
        return ActionSpec.from_statistics(
            entry, config.normalization, config.clip, spec.gripper_env, spec.hz
        )
    except ValueError as error:
        raise ConfigError(
            f"data.statistics: {name!r}: data.normalization = {config.normalization} cannot be "
            f"made of them: {error}; choose another one, or let the data be measured"
        ) from error


def _warn_of_lost_motion(
    dataset: Dataset, entry: Mapping[str, Any], spec: ActionSpec, states: int
) -> None:
    """Tells of recorded motion that the model is not shown; the actions are in robot units."""
    cut = 0.5 if spec.normalization == "normal" else 0.1  # a third lies beyond one deviation
    if spec.normalization != "none":
        lines = lost_motion(dataset.actions, spec.normalize, spec.unnormalize, "action", cut)
        for line in lines:
            log.warning("%s: %s", dataset.name, line)
    if states and dataset.proprio is not None and entry.get("proprio"):
        with contextlib.suppress(ValueError):  # `_states` says what is wrong with them
            state_spec = StateSpec.from_statistics(entry, states)
            both = state_spec.normalize, state_spec.unnormalize
            for line in lost_motion(dataset.proprio, *both, "state"):
                log.warning("%s: %s", dataset.name, line)


def _is_constant(action: Mapping[str, Any]) -> bool:
    """Whether the gripper never moves; unknown counts as no."""
    ends = [action[key][-1] for key in ("min", "max") if key in action]
    return len(ends) == 2 and ends[0] == ends[1]


def _states(
    name: str, entry: Mapping[str, Any], states: np.ndarray | None, dim: int
) -> np.ndarray | None:
    """What the model takes of the recorded states, normalized: nothing, or `dim` numbers each."""
    if not dim:
        return None
    try:
        spec = StateSpec.from_statistics(entry, dim)
    except ValueError as error:
        raise ConfigError(f"model.structure.proprio: dataset {name!r}: {error}") from error
    return spec.normalize(np.asarray(states))


def _sources(
    entry: DatasetConfig, config: DataConfig, reader: Reader
) -> dict[str, tuple[str, Part]]:
    """Where train and val come from: a split, and which part of it."""
    if config.val_split in reader.splits(to_folder(entry.dir)):
        return {"train": (config.train_split, "all"), "val": (config.val_split, "all")}
    return {"train": (config.train_split, "head"), "val": (config.train_split, "tail")}


def _specs(entries: Sequence[DatasetConfig], variant: str) -> list[DatasetSpec]:
    specs, problems = [], []
    for i, entry in enumerate(entries):
        try:
            specs.append(find_spec(entry.spec, variant))
        except KeyError as error:
            problems.append(f"data.datasets[{i}].spec: {error.args[0]}")
    if problems:
        raise ConfigError("\n".join(problems))
    return specs


def _names(entries: Sequence[DatasetConfig]) -> list[str]:
    """The specs' names; a spec that occurs again gets -2, -3, ..."""
    occurrences: Counter[str] = Counter()
    names = []
    for entry in entries:
        name = short_name(entry.spec)
        occurrences[name] += 1
        names.append(name if occurrences[name] == 1 else f"{name}-{occurrences[name]}")
    return names


def _canvas(
    camera: str, datasets: Sequence[Dataset], image_size: tuple[int, int] | None
) -> tuple[int, int]:
    sizes = {d.name: d.image_sizes[camera] for d in datasets if camera in d.image_sizes}
    if not sizes:
        raise MissingCameraError(f"no dataset of {[d.name for d in datasets]} has {camera!r}")
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    if image_size is None:
        raise DataError(
            f"camera {camera!r} has images of different sizes: {sizes}; pass image_size"
        )
    return image_size
