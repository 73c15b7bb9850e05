import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_jax.config import (
    DataConfig,
    DataParity,
    DatasetConfig,
    FiltersConfig,
    LanguageConfig,
    StructureConfig,
)
from vla_jax.data import features
from vla_jax.data.rlds.writer import RLDSWriter

BRIDGE = Path(__file__).parents[1] / "fixtures" / "bridge_dataset" / "1.0.0"


@pytest.fixture
def bridge():
    return BRIDGE


@pytest.fixture
def data_config(tmp_path):
    """Builds a DataConfig over (spec, dir, weight) entries; indices go to a temporary folder.

    Changes may name options of `data` and of `data.parity`.
    """

    def build(*entries, **changes):
        datasets = tuple(DatasetConfig(s, str(d), w) for s, d, w in entries)
        parity = {f.name for f in dataclasses.fields(DataParity)} & set(changes)
        changes["parity"] = {name: changes.pop(name) for name in parity}
        groups = {"filters": FiltersConfig, "language": LanguageConfig, "parity": DataParity}
        for name, group in groups.items():
            changes[name] = group(**changes.get(name, {}))
        cache = str(tmp_path / "cache")
        options: dict[str, Any] = {"datasets": datasets, "cache_dir": cache, **changes}
        return DataConfig(**options)

    return build


@pytest.fixture
def structure():
    def build(window=3, chunk=4, cameras=("primary",), proprio=0):
        return StructureConfig(
            window=window, chunk=chunk, cameras=tuple(cameras), text_len=16, proprio=proprio
        )

    return build


def write_calvin(
    folder, lengths, seed=0, size=24, texts=None, splits=("train",), spans=False, idle=(), **writer
):
    """A small CALVIN-shaped dataset whose pixels and actions name their episode and step.

    `spans` records a start and an end: episode e begins at 1000 + 100 e. `idle` holds (episode,
    first, stop) of frames without motion.
    """
    described = {
        "steps": {
            "observation": {
                "rgb_static": features.image(size, size, "png"),
                "rgb_gripper": features.image(8, 12, "jpeg"),
                "robot_obs": features.tensor((15,)),
            },
            "rel_actions": features.tensor((7,)),
            "language_instruction": features.text(),
        }
    }
    if spans:
        number = features.tensor((), "int64")
        described["episode_metadata"] = {"start": number, "end": number}
    rng = np.random.default_rng(seed)
    with RLDSWriter(folder, "calvin", described, **writer) as out:
        for split in splits:
            for number, length in enumerate(lengths):
                action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
                action[:, 0] = number / 100
                action[:, 1] = np.arange(length) / 100
                action[:, 6] = rng.choice([-1, 1], length)
                for episode, first, stop in idle:
                    if episode == number:
                        action[first:stop, :6] = 0
                        action[first:stop, 6] = action[max(first - 1, 0), 6]
                static = np.zeros((length, size, size, 3), np.uint8)
                static[..., 0], static[..., 1] = number, np.arange(length)[:, None, None]
                steps = {
                    "observation": {
                        "rgb_static": static,
                        "rgb_gripper": rng.integers(0, 255, (length, 8, 12, 3)).astype(np.uint8),
                        "robot_obs": rng.normal(size=(length, 15)).astype(np.float32),
                    },
                    "rel_actions": action,
                    "language_instruction": texts[number] if texts else f"task {number % 3}",
                }
                start = 1000 + 100 * number
                span = {"episode_metadata": {"start": start, "end": start + length}}
                out.write(split, {"steps": steps, **(span if spans else {})})
    return folder


@pytest.fixture
def calvin(tmp_path):
    return write_calvin(tmp_path / "calvin" / "1.0.0", [7, 3, 11, 5])
