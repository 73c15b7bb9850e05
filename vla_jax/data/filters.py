"""Filters that choose trajectories and windows, over numbers and texts, never over images.

Axis letters: e trajectories, k = e + 1, n frames, a action dimension.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from vla_jax.config import ConfigError, FiltersConfig, read_json
from vla_jax.data.sampler import Stream, uniform

# Where a dataset says which frames of the recording an episode is, for lists of [start, end] pairs.
SPAN = ("episode_metadata/start", "episode_metadata/end")


@dataclass(frozen=True)
class Filters:
    """The filters of one dataset; see `data.filters`.

    Attributes:
        say: an instruction counts only if this is found in it.
        silence: and this is not.
        episodes: numbers within the split, or (start, end) pairs, that are kept; None = all.
        few_shot: trajectories kept of each instruction; 0 = all.
        few_shot_seed: which ones.
    """

    say: re.Pattern[str] | None = None
    silence: re.Pattern[str] | None = None
    episodes: frozenset[int] | frozenset[tuple[int, int]] | None = None
    few_shot: int = 0
    few_shot_seed: int = 0

    @property
    def by_span(self) -> bool:
        """Whether `episodes` are (start, end) pairs."""
        return any(isinstance(entry, tuple) for entry in self.episodes or ())

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Those of a trajectory's instructions that may be used."""
        return [
            text
            for text in texts
            if (self.say is None or self.say.search(text))
            and (self.silence is None or not self.silence.search(text))
        ]

    def few(self, instructions: Sequence[int]) -> Bool[np.ndarray, "e"]:
        """The trajectories that stay: of each instruction at most `few_shot`, drawn by the seed.

        Args:
            instructions: of each trajectory, as a number.
        """
        codes = np.asarray(instructions, np.int64)
        draw = uniform(self.few_shot_seed, Stream.FEW_SHOT, np.arange(len(codes)), 1)[:, 0]
        # By instruction, then by the draw: the first few of each instruction are random ones.
        order = np.lexsort((draw, codes))
        ranked = codes[order]
        first = np.searchsorted(ranked, ranked)  # where its instruction begins
        keep = np.zeros(len(codes), bool)
        keep[order] = np.arange(len(codes)) - first < self.few_shot
        return keep


def make_filters(config: FiltersConfig, names: Sequence[str], train: bool) -> dict[str, Filters]:
    """The filters of each dataset.

    Args:
        config: `data.filters`.
        names: of the datasets of the mixture.
        train: the training part; the others are not thinned out: `episodes` and `few_shot` are
            not applied to them.

    Raises:
        ConfigError: the file of episodes cannot be read, or names no dataset of the mixture.
    """
    listed = _read_episodes(Path(config.episodes).expanduser(), names) if config.episodes else {}
    return {
        name: Filters(
            say=_any_of(config.language),
            silence=_any_of(config.not_language),
            episodes=listed.get(name) if train else None,
            few_shot=config.few_shot if train else 0,
            few_shot_seed=config.few_shot_seed,
        )
        for name in names
    }


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None


def _read_episodes(path: Path, names: Sequence[str]) -> dict[str, Any]:
    raw = read_json(path, "data.filters.episodes: ", "{dataset: [episodes]}")
    problems = [
        f"{name!r} is no dataset of the mixture; it has {list(names)}"
        for name in raw
        if name not in names
    ]
    episodes: dict[str, Any] = {}
    for name, entries in raw.items():
        # By type() rather than isinstance(), as JSON's true and false are ints too.
        numbers = isinstance(entries, list) and all(type(e) is int for e in entries)
        pairs = isinstance(entries, list) and all(
            isinstance(e, list) and len(e) == 2 and all(type(x) is int for x in e) for e in entries
        )
        if not entries or not (numbers or pairs):
            problems.append(f"{name!r}: expected numbers, or [start, end] pairs")
        else:
            episodes[name] = frozenset(entries if numbers else map(tuple, entries))
    if problems:
        raise ConfigError("\n  ".join([f"data.filters.episodes: {path}:", *problems]))
    return episodes


def moving(
    actions: Float32[np.ndarray, "n a"],
    starts: Int64[np.ndarray, "k"],
    chunk: int,
    threshold: float,
    gripper: bool = True,
) -> Bool[np.ndarray, "n"]:
    """True at frames from which the robot does something within a chunk.

    A frame is idle if no arm dimension moves by more than `threshold` and the gripper stays as it
    was at the frame before; meant for relative actions. Sources: the same test of the action is
    openvla's on DROID (one frame) and on LIBERO (at conversion); openpi drops frames before which
    nothing happens for long.

    Args:
        actions: in the dataset's own units, of all trajectories one after another.
        starts: first row of each trajectory.
        chunk: f, frames looked at, the frame itself included.
        threshold: largest motion that counts as none.
        gripper: whether the last dimension is one.
    """
    frames = len(actions)
    arm = actions[:, :-1] if gripper else actions
    moves = np.abs(arm).max(axis=1) > threshold
    if gripper:
        changes = np.abs(np.diff(actions[:, -1], prepend=actions[:1, -1])) > threshold
        changes[starts[:-1]] = False  # the frame before is another trajectory's
        moves |= changes
    # The next frame that moves, at or after each one: a running minimum from the end.
    following = np.where(moves, np.arange(frames), frames)
    following = np.minimum.accumulate(following[::-1])[::-1]
    # No frame looks beyond the end of its own trajectory.
    last = np.repeat(starts[1:], np.diff(starts)) - 1
    # A frame without a motion ahead gets a number beyond every limit, and so is idle.
    return following <= np.minimum(np.arange(frames) + chunk - 1, last)
