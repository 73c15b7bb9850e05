"""Opening one dataset: its description, its index, and all its numbers and texts in memory.

Images stay where they are. Axis letters: e trajectories, n frames, a action dimension.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
from jaxtyping import Bool

from vla_jax.data.dataset import Dataset
from vla_jax.data.errors import DataError, FeatureError, MissingCameraError, Skips
from vla_jax.data.features import STEPS
from vla_jax.data.filters import SPAN, Filters
from vla_jax.data.formats import Reader, find_reader
from vla_jax.data.places import data_path
from vla_jax.data.requested import (
    check_episodes,
    find_cameras,
    find_feature,
    held_size,
    lacking_cameras,
    partners,
    unfit,
)
from vla_jax.data.source import Source
from vla_jax.data.spec import DatasetSpec, Trajectory
from vla_jax.data.standardize import instructions, standardize

Part = Literal["all", "head", "tail"]
# (episode, its first frame, the next episode's) -> array of one feature.
Column = Callable[[int, int, int], np.ndarray]
log = logging.getLogger(__name__)
# The largest collections have some millions; what is kept for each number would not fit above it.
_MOST_EPISODES = 10**8


def open_dataset(
    name: str,
    spec: DatasetSpec,
    directory: str | FilePath,
    split: str,
    cameras: Sequence[str],
    action_dim: int,
    part: Part = "all",
    held_out: float = 0.0,
    cache_dir: str = "",
    rebuild: bool = False,
    filters: Filters | None = None,
    skips: Skips | None = None,
    reader: Reader | None = None,
    fast_dct: bool = True,
) -> Dataset:
    """Opens, and if need be indexes, one split of one dataset, whatever its format.

    Args:
        name: for messages.
        spec: how it is standardized.
        directory: of the data; see `vla_jax.data.formats`.
        split: of its splits.
        cameras: roles that are needed.
        action_dim: a, which the spec must produce.
        part: all of its trajectories, all but the last `held_out` ("head"), or those ("tail").
        held_out: as a share of the trajectories; at least one if any.
        cache_dir: where indices live; see `cached_folder`.
        rebuild: index anew.
        filters: of its trajectories; None = all that have a text.
        skips: what to do about parts that are wrong; None = raise.
        reader: of its format; None = the one for random access.
        fast_dct: how its JPEGs will be decoded, see `vla_jax.data.decode.decode`.

    Raises:
        DataError: listing every camera and feature that is missing. A view it lacks is black where
            `skips` allows it.
    """
    filters, skips = filters or Filters(), skips or Skips(name)
    folder, reader = data_path(directory), reader or find_reader(directory)
    features = reader.features(folder)
    roles = list(dict.fromkeys([*cameras, *partners(spec, cameras)]))
    images = find_cameras(spec, features, roles)
    needed = {**spec.features, **({path: path for path in SPAN} if filters.by_span else {})}
    columns = {short: find_feature(features, path) for short, path in needed.items()}
    problems = [f"no feature {needed[short]!r}" for short, path in columns.items() if path is None]
    lacking = lacking_cameras(spec, features, [role for role in roles if role not in images])
    problems += unfit(features, images, [path for path in columns.values() if path])
    try:
        spec.mask(action_dim)
    except ValueError as error:
        problems.append(str(error))
    available = sorted(path.removeprefix(STEPS) for path in features)  # as a spec names them
    # A camera that is missing is all that may be skipped: its view is black then.
    if lacking and not problems:
        error = MissingCameraError(f"{name}: {lacking}. It has {available}", folder)
        skips.add(error)
    elif problems:
        listing = "; ".join([*([lacking] if lacking else []), *problems])
        raise FeatureError(f"{name}: {listing}. It has {available}", folder)
    paths = {short: path for short, path in columns.items() if path}
    low = sorted(set(paths.values()))
    source = reader.open(folder, split, low, cache_dir, rebuild, skip=skips.allowed)
    total = source.num_episodes
    # At least one trajectory on either side, as long as there are two.
    held = min(max(1, round(total * held_out)), total - 1) if held_out > 0 else 0
    parts = {"all": range(total), "head": range(total - held), "tail": range(total - held, total)}
    if total == 1 and part == "tail":
        log.warning("%s: one trajectory, so what is held out for evaluation is trained on", name)
        parts["tail"] = range(1)
    if not parts[part]:
        problem = f"{name}: split {split!r} has {total} trajectories, too few to hold some out"
        raise DataError(problem + f" ({held_out=})", folder)
    return _read(
        name, spec, source, paths, images, parts[part], action_dim, filters, skips, fast_dct
    )


def column_reader(source: Source, path: str) -> Column:
    """Reads one feature of one episode: (episode, its first frame, the next's) -> array."""
    if source.features[path].kind == "text":
        codes, table = source.text(path)
        texts = np.array(table, object)
    else:
        codes, texts = source.low(path), None
    per_step = path.startswith(STEPS)

    def read(episode: int, first: int, stop: int) -> np.ndarray:
        values = codes[first:stop] if per_step else codes[episode : episode + 1]
        return values if texts is None else texts[values]

    return read


def _read(
    name: str,
    spec: DatasetSpec,
    source: Source,
    paths: Mapping[str, str],
    cameras: Mapping[str, str],
    episodes: range,
    action_dim: int,
    filters: Filters,
    skips: Skips,
    fast_dct: bool,
) -> Dataset:
    """Standardizes `episodes` of an opened source; see `open_dataset`."""
    for error, parts in source.skipped:
        skips.add(error, parts)
    # An upper bound, as some frames will be left out.
    capacity = int(source.starts[episodes.stop] - source.starts[episodes.start])
    rows = _Rows(capacity, action_dim)
    raw = {short: column_reader(source, path) for short, path in paths.items()}
    frames, texts = [], []
    check_episodes(filters, source, name)
    last = int(source.numbers.max(initial=0))
    if last > _MOST_EPISODES:
        raise DataError(f"{name}: episode number {last}: the dataset miscounts its episodes")
    # By the episode's number alone: the same for every process, seed and part of the split.
    swaps = np.random.default_rng(0).integers(0, 2, last + 1)
    mistake: FeatureError | None = None
    unused: Counter[str] = Counter()
    sound = 0
    table: dict[str, int] = {}
    for episode in episodes:
        first, stop = int(source.starts[episode]), int(source.starts[episode + 1])
        columns = {short: read(episode, first, stop) for short, read in raw.items()}
        number = int(source.numbers[episode])
        if not _is_listed(filters, number, columns):
            unused["are not listed in data.filters.episodes"] += 1
            continue
        try:
            trajectory = _standardize(name, spec, source, columns, first, stop, action_dim, rows)
        except DataError as error:
            if isinstance(error, FeatureError):
                mistake = mistake or error
            skips.add(error)
            continue
        sound += 1
        begin, end, stride = trajectory.keep.indices(stop - first)
        spoken = instructions(trajectory)
        allowed = filters.texts(spoken)
        if not spoken or not allowed or end <= begin:
            unused[
                "have no text" if not spoken
                else "say what data.filters leaves out" if not allowed
                else "have no frame that may be used"
            ] += 1  # fmt: skip
            continue
        rows.append(trajectory)
        # The place in the source, as images are read there and not from the kept rows.
        frames.append((first + begin, stride, swaps[number]))
        texts.append([table.setdefault(text, len(table)) for text in allowed])
    chosen = np.ones(len(frames), bool)
    if filters.few_shot and frames:
        chosen = filters.few([codes[0] for codes in texts])
        unused["are beyond data.filters.few_shot"] += int((~chosen).sum())
    for reason, count in unused.items():
        if count:
            level = logging.WARNING if reason.startswith("have no") else logging.INFO
            log.log(level, "%s: %d of %d trajectories %s", name, count, len(episodes), reason)
    # Readers put this character in the place of bytes that are no UTF-8.
    if garbled := [text for text in table if "\ufffd" in text]:
        log.warning("%s: texts in another encoding than UTF-8: %s", name, garbled[:3])
    if skips.counts:
        log.warning("%s", skips)
    if mistake and not sound:  # no episode fits what is asked for: a mistake, nothing to skip
        raise mistake
    skips.check(len(episodes) + sum(parts for _, parts in source.skipped))
    if not frames:
        reasons = [f"{count} {reason}" for reason, count in unused.items()]
        reasons += skips.causes()
        raise DataError(f"{name}: no trajectory is left: {'; '.join(reasons)}", source.root)
    actions, proprio, starts = rows.chosen(chosen)
    chosen_codes = [codes for codes, keep in zip(texts, chosen, strict=True) if keep]
    where = np.ascontiguousarray(np.array(frames, np.int64)[chosen].T)
    sizes = {
        path: held_size(source, path, where[0].tolist(), name, skips.allowed)
        for path in dict.fromkeys(cameras.values())
    }
    return Dataset(
        name=name,
        spec=spec,
        source=source,
        cameras=dict(cameras),
        actions=actions,
        proprio=proprio,
        starts=starts,
        first_frames=where[0],
        strides=where[1],
        swapped=where[2],
        text=np.array([code for codes in chosen_codes for code in codes], np.int32),
        text_starts=np.cumsum([0, *(len(codes) for codes in chosen_codes)]).astype(np.int64),
        instructions=list(table),
        sizes={path: size for path, (size, _) in sizes.items()},
        # Where no size is declared, images of several are nothing to warn of.
        varied={path for path, (_, fixed) in sizes.items() if not fixed},
        skips=skips,
        unused=unused,
        fast_dct=fast_dct,
    )


def _standardize(
    name: str,
    spec: DatasetSpec,
    source: Source,
    columns: Mapping[str, np.ndarray],
    first: int,
    stop: int,
    action_dim: int,
    rows: "_Rows",
) -> Trajectory:
    """One episode, checked; `first` is its first frame, `stop` the next one's."""
    try:
        return standardize(spec, columns, stop - first, action_dim, rows.state_dim)
    except DataError as error:
        # The check knows the frame within the episode, the source its file.
        file, number, _ = source.place(first + max(error.frame, 0))
        raise type(error)(f"{name}: {error.problem}", file, number, error.frame) from error


class _Rows:
    """Actions and states of the kept frames, gathered one trajectory after another.

    Attributes:
        state_dim: numbers of a state, 0 without states; None before the first trajectory.
    """

    def __init__(self, capacity: int, action_dim: int):
        self.state_dim: int | None = None
        self._capacity = capacity
        self._actions = np.empty((capacity, action_dim), np.float32)
        self._proprio: np.ndarray | None = None
        self._starts = [0]

    def append(self, trajectory: Trajectory) -> None:
        """Stores the kept frames of one more trajectory."""
        action, row = trajectory.action[trajectory.keep], self._starts[-1]
        stop = row + len(action)
        self._actions[row:stop] = action
        self._starts.append(stop)
        states = trajectory.proprio
        self.state_dim = 0 if states is None else states.shape[1]
        if states is not None:
            if self._proprio is None:
                # Made late: the first sound episode tells how many numbers a state has.
                self._proprio = np.empty((self._capacity, states.shape[1]), np.float32)
            self._proprio[row:stop] = states[trajectory.keep]

    def chosen(
        self, chosen: Bool[np.ndarray, "e"]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Actions, states and starts of the chosen trajectories."""
        starts = np.array(self._starts, np.int64)
        actions = self._actions[: starts[-1]]
        proprio = None if self._proprio is None else self._proprio[: starts[-1]]
        lengths = np.diff(starts)
        # Indexing by a mask copies everything, so it is done only where something goes.
        if not chosen.all():
            rows = np.repeat(chosen, lengths)
            actions, proprio = actions[rows], None if proprio is None else proprio[rows]
        return actions, proprio, np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)


def _is_listed(filters: Filters, number: int, columns: Mapping[str, np.ndarray]) -> bool:
    if filters.episodes is None:
        return True
    if not filters.by_span:
        return number in filters.episodes
    return tuple(int(columns[path].item()) for path in SPAN) in filters.episodes
