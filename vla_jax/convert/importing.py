"""Foreign checkpoints -> ours: what is read, what is made anew, what travels beside the weights."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax import rules
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.convert import hf, lora, maps, output, released, robovlms, store
from vla_jax.convert.safetensors_io import SUFFIX, Safetensors
from vla_jax.convert.tensors import Lazy
from vla_jax.data.text import Tokenizer
from vla_jax.models import vla
from vla_jax.models.weights import WeightError
from vla_jax.policy import with_complete_arch

logger = logging.getLogger(__name__)

# Beside the VLM in a folder that `exporting.to_hf` wrote.
POLICY, SETTINGS, STATISTICS = "policy_head", "vla_config.json", "dataset_statistics.json"


@dataclass(frozen=True)
class Import:
    """A checkpoint to be, all checks passed.

    Attributes:
        config: of the model; complete, without the source.
        leaves: our path -> parameter to come.
        meta: what the checkpoint carries beside the weights.
        fresh: paths of parameters the source lacks, which start at random.
        changed: sentences on types that change.
        unused: names of the source that carry nothing.
    """

    config: Config
    leaves: dict[str, Lazy]
    meta: dict[str, Any]
    fresh: tuple[str, ...]
    changed: tuple[str, ...]
    unused: tuple[str, ...]

    def save(
        self, workdir: str | Path, overwrite: bool, done: Callable[[Lazy], None] = lambda _: None
    ) -> None:
        """Write step 0 of a new workdir: all of it, or nothing.

        Raises:
            OutputError: the folder holds something and `overwrite` is off.
        """
        with output.whole(workdir, overwrite) as folder:
            store.write(folder, self.leaves, self.meta, done)


def from_hf(
    source: str | Path, raw: Mapping[str, Any] | None, dtype: np.dtype | None = None
) -> Import:
    """A Hugging Face folder: the VLM, and the policy if `exporting.to_hf` wrote it.

    Args:
        source: the folder.
        raw: our raw config; None takes the one in the folder.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the files cannot be read.
        ConfigError: no config, or not one of these files.
    """
    source = Path(source)
    settings = read_json(source / SETTINGS) if (source / SETTINGS).is_file() else {}
    if raw is None and not settings:
        raise ConfigError(f"{source}: holds no {SETTINGS}; name a config, --config=FILE")
    config = resolve(settings["config"] if raw is None else raw)
    if not (source / "config.json").is_file():
        raise WeightError(f"{source}: holds no config.json")
    # In our own folders the exact numbers are in our config; elsewhere in config.json.
    own = settings and raw is None
    arch = None if own else hf.read_arch(source, config.model)
    model, config = _complete(config, arch, source)
    shapes = _shapes(model)
    rows, ignore = maps.hugging_face(config.model)
    vlm = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    parts = [maps.incoming(rows, vlm, hf.open_source(source, config.model), ignore, dtype)]
    rest = {path: shape for path, shape in shapes.items() if path not in vlm}
    if own and rest:
        head = Safetensors(source / f"{POLICY}{SUFFIX}")
        parts.append(maps.incoming(maps.policy(config.model), rest, head, (), dtype))
        rest = {}
    if own and (source / lora.FOLDER).is_dir():
        adapter = Safetensors(source / lora.FOLDER / lora.WEIGHTS)
        factors = lora.adapter_shapes(rows, vlm, adapter)
        parts.append(maps.incoming(lora.adapter_rows(rows, factors), factors, adapter, (), dtype))
    statistics = source / STATISTICS
    meta = {
        "config": to_dict(config),
        "statistics": read_json(statistics) if own and statistics.is_file() else {},
        "action_specs": settings.get("action_specs", {}) if own else {},
        "tokenizer": _tokenizer(source),
        "origin": {"kind": "hf", "vlm_config": read_json(source / "config.json")},
    }
    return _join(config, parts, meta, _random(model, config.seed, rest, dtype))


def from_robovlms(
    checkpoint: str | Path,
    original: Mapping[str, Any],
    base: Mapping[str, Any],
    vlm: str | Path | None = None,
    statistics: Mapping[str, Any] | None = None,
    dtype: np.dtype | None = None,
) -> Import:
    """A checkpoint of RoboVLMs and its JSON config.

    Args:
        checkpoint: .pt or .safetensors.
        original: their config.
        base: our raw config with defaults.
        vlm: Hugging Face folder of the VLM, for its config.json and tokenizer; None = the released
            architecture, no tokenizer.
        statistics: dataset -> entry of a dataset_statistics.json.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the file cannot be read.
        ConfigError: their config asks for what is not here, or statistics are missing.
    """
    config = resolve(robovlms.to_config(original, base))
    names = tuple(dataset.spec for dataset in config.data.datasets)
    given = statistics or {}
    specs = released.action_specs(
        names, config.data.normalization, config.data.clip, config.model.action_dim, given
    )
    alpha = original.get("train_setup", {}).get("lora_alpha")
    source = robovlms.open_source(checkpoint, alpha)
    found = {name.removeprefix("backbone."): shape for name, shape in source.shapes.items()}
    arch = hf.read_arch(vlm, config.model, found)
    model, config = _complete(config, arch, vlm)
    rows, ignore = maps.robovlms(config.model, prefix="")
    ignore = (*ignore, *robovlms.IGNORE)
    part = maps.incoming(rows, _shapes(model), source, ignore, dtype, source.unequal())
    meta = {
        "config": to_dict(config),
        "statistics": {name: given[name] for name in names if name in given},
        "action_specs": {name: spec.to_json() for name, spec in specs.items()},
        "tokenizer": _tokenizer(vlm) if vlm else "",
        "origin": {
            "kind": "robovlms",
            "config": dict(original),
            **({"vlm_config": read_json(Path(vlm) / "config.json")} if vlm else {}),
        },
    }
    return _join(config, [part], meta, {})


def _complete(config: Config, arch: dict[str, Any] | None, folder: str | Path | None) -> Any:
    """The model, and the config as checkpoints carry it; remembers the folder for its tokenizer."""
    model = vla.build(config.model, arch)
    config = with_complete_arch(config, model.arch)
    where = str(Path(folder).absolute()) if folder else ""
    backbone = dataclasses.replace(config.model.backbone, hf_dir=where)
    model_config = dataclasses.replace(config.model, backbone=backbone)
    return model, dataclasses.replace(config, model=model_config)


def _shapes(model: vla.VLA) -> dict[str, tuple[int, ...]]:
    init = functools.partial(vla.initial_params, model)
    tree = jax.eval_shape(init, jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in rules.flatten(tree).items()}


def _random(
    model: vla.VLA, seed: int, shapes: Mapping[str, Any], dtype: np.dtype | None
) -> dict[str, Lazy]:
    """The parameters a run with this seed would start with; the rest of the model is not made."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        flat = rules.flatten(vla.initial_params(model, key))
        return {path: flat[path] for path in shapes}

    @functools.cache
    def values() -> dict[str, jax.Array]:
        return jax.jit(make)(jax.random.split(jax.random.key(seed))[0])  # as in train.state.create

    stored = dtype or np.dtype(np.float32)
    return {
        path: Lazy(shape, stored, lambda path=path: np.asarray(values()[path], stored))
        for path, shape in shapes.items()
    }


def _tokenizer(folder: str | Path) -> str:
    try:
        return Tokenizer.from_dir(folder).to_json()
    except (FileNotFoundError, ImportError) as error:
        logger.warning("%s; the checkpoint can be converted and trained, not served", error)
        return ""


def _join(
    config: Config, parts: list[maps.Incoming], meta: dict[str, Any], fresh: dict[str, Lazy]
) -> Import:
    leaves = {path: leaf for part in parts for path, leaf in part.leaves.items()}
    return Import(
        config=config,
        leaves={**leaves, **fresh},
        meta=meta,
        fresh=tuple(fresh),
        changed=tuple(line for part in parts for line in part.changed),
        unused=tuple(name for part in parts for name in part.unused),
    )


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
        ConfigError: it is missing or something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object, found {type(found).__name__}")
    return found
