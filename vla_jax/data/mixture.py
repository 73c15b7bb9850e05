"""All datasets of a run, opened together: windows, instructions, statistics, action specs."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vla_jax.config import ConfigError, DataConfig, DatasetConfig, StructureConfig
from vla_jax.data.dataset import Prepared
from vla_jax.data.errors import DataError, FeatureError, MissingCameraError, Skips
from vla_jax.data.filters import make_filters
from vla_jax.data.find_spec import find_spec, short_name
from vla_jax.data.formats import Reader, find_reader
from vla_jax.data.given import given_reader
from vla_jax.data.language.instructions import Instructions
from vla_jax.data.open_dataset import Part, open_dataset
from vla_jax.data.places import data_path, is_remote
from vla_jax.data.spec import DatasetSpec
from vla_jax.data.units.foreign_statistics import read_statistics
from vla_jax.data.units.lost_motion import check_motion, warn_of_options
from vla_jax.data.units.measure import fitted, measure, measure_chunks
from vla_jax.data.units.prepare import Units, choose_units, prepare

_PARTS = ("train", "val")


class Mixture:
    """Opened datasets and the shape of the windows that are drawn from them.

    Attributes:
        datasets: in model units, see `vla_jax.data.dataset.Prepared`.
        names: of the datasets; `Batch.dataset` indexes it.
        weights: of one window of each.
        sizes: windows of each.
        num_windows: their sum.
        instructions: every distinct text a sample may be told, sorted.
        statistics: name -> statistics of the train part, in openvla's schema.
        action_specs: name -> how model outputs become that robot's actions.
        units: name -> its units where `data.units` names a rule, which then count in place of the
            action spec.
        window, chunk, cameras, proprio: of the model's structure.
        image_sizes: camera -> (height, width) of the batch's images.
        windows: of each dataset, see `vla_jax.data.sampler.Windows`.
        language: what a sample is told; its codes index `instructions`.
        random_goal, padded_rows, pool: see the same names in `data`.
        block: samples over which the shares come out even.
        digest: changes when the windows or their order would.
        content: changes when the recorded numbers would, in files of the same names and sizes.
    """

    def __init__(
        self,
        datasets: Sequence[Prepared],
        weights: Sequence[float],
        statistics: Mapping[str, Any],
        units: Mapping[str, Units],
        structure: StructureConfig,
        config: DataConfig,
        train: bool,
        image_size: tuple[int, int] | None,
    ):
        """Joins prepared datasets; see `open_datasets`."""
        self.datasets, self.weights = list(datasets), [float(w) for w in weights]
        self.names = [dataset.name for dataset in datasets]
        self.statistics = dict(statistics)
        self.action_specs = {name: chosen.action for name, chosen in units.items()}
        self.units = {name: u.chunks for name, u in units.items() if u.chunks is not None}
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
            [[d.name, d.source.digest, d.starts.tolist(), d.digest] for d in datasets],
            [self.weights, self.sizes, self.window, parity.left_pad, segment, self.block],
        ]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        # Apart from the digest, because positions that were stored earlier have no such entry.
        contents = json.dumps([d.source.content for d in datasets])
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
    # Once a run: the validation part is opened with the same options.
    if split == "train":
        warn_of_options(config)
    missing = [name for name in names if statistics is not None and name not in statistics]
    left_out = Skips("data.datasets", config.on_error)
    if missing and not left_out.allowed:
        available = sorted(statistics or {})
        raise ConfigError(f"the statistics lack {missing}; they have {available}")
    measured: dict[str, Any] = {}
    units: dict[str, Units] = {}
    datasets, weights = [], []
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
                skips=Skips(name, config.on_error, config.max_skipped_share),
                reader=reader,
                fast_dct=config.parity.dct == "fast",
            )
            for which, (source, part) in sources.items()
        }
        try:
            # Without statistics "val" needs the train part too, to measure it.
            recorded = opened["train" if statistics is None else split]()
        except FeatureError as error:
            left_out.add(error)
            continue
        if statistics is not None:
            measured[name] = statistics[name]
        else:
            parts = [recorded]
            held_out = config.val_fraction or sources["val"][1] == "all"
            # Some projects measure over what they hold out, too.
            if config.parity.stats_split == "all" and held_out:
                parts.append(opened["val"]())
            # Trajectories in memory and object stores have no folder that a cache could lie beside.
            folder = None if name in streamed else data_path(entry.dir)
            local = None if folder is None or is_remote(folder) else folder
            measured[name] = measure(parts, action_dim, local, config)
            recorded = opened["val"]() if split == "val" else recorded
        # After the measurement, which is over all frames, those before which the robot idles
        # included.
        if noop := config.filters.noop or spec.noop:
            recorded = recorded.without_idle(noop, structure.chunk)
        measured[name] = fitted(name, measured[name], action_dim, structure.proprio)
        if config.units:
            measured[name] = measure_chunks(measured[name], recorded, structure.chunk, config)
        units[name] = choose_units(name, measured[name], spec, structure, config)
        if split == "train":
            check_motion(recorded, units[name])
        datasets.append(prepare(recorded, units[name]))
        weights.append(entry.weight)
    if not datasets:
        causes = "\n  ".join(left_out.causes())
        raise DataError(f"no dataset is left of {names}: {left_out}\n  {causes}")
    train = split == "train"
    return Mixture(datasets, weights, measured, units, structure, config, train, image_size)


def _sources(
    entry: DatasetConfig, config: DataConfig, reader: Reader
) -> dict[str, tuple[str, Part]]:
    """Where train and val come from: a split, and which part of it."""
    if config.val_split in reader.splits(data_path(entry.dir)):
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
    camera: str, datasets: Sequence[Prepared], image_size: tuple[int, int] | None
) -> tuple[int, int]:
    sizes = {d.name: d.image_sizes[camera] for d in datasets if camera in d.image_sizes}
    if not sizes:
        raise MissingCameraError(f"no dataset of {[d.name for d in datasets]} has {camera!r}")
    # The images of a camera share one array of a batch, so they need one size.
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    if image_size is None:
        raise DataError(
            f"camera {camera!r} has images of different sizes: {sizes}; pass image_size"
        )
    return image_size
