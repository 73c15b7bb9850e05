"""Foreign checkpoints -> ours: what is read, what is made anew, what travels beside the weights."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax import rules
from vla_jax.config import Config, ConfigError, read_json, resolve, to_dict, upgrade
from vla_jax.convert import lora, maps, output, store
from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors
from vla_jax.convert.hf import source as hf
from vla_jax.convert.robovlms import released
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.convert.tensors import Lazy
from vla_jax.data.units.foreign_statistics import read_statistics
from vla_jax.inference.policy import with_complete_arch
from vla_jax.models import vla
from vla_jax.models.weights import WeightError
from vla_jax.train.lora import factor_shapes

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
    settings = _settings(source) if (source / SETTINGS).is_file() else {}
    if raw is None and not settings:
        raise ConfigError(f"{source}: holds no {SETTINGS}; name a config, --config=FILE")
    config = resolve(settings["config"] if raw is None else raw)
    if not (source / "config.json").is_file():
        raise WeightError(f"{source}: holds no config.json")
    # In our own folders the exact numbers are in our config; elsewhere in config.json.
    is_ours = bool(settings) and raw is None
    arch = None if is_ours else hf.read_arch(source, config.model)
    model, config, shapes = complete(config, arch, source)
    rows, ignore = maps.hugging_face(config.model)
    vlm = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    fresh = {path: shape for path, shape in shapes.items() if path not in vlm}
    # Every part is checked before the first error is raised, so one report names all that is wrong.
    steps = {
        "the VLM": lambda: maps.incoming(
            rows, vlm, hf.open_source(source, config.model), ignore, dtype
        )
    }
    if is_ours and fresh:
        # The lambda runs later, when `fresh` is already empty.
        fill, path = fresh, source / f"{POLICY}{SUFFIX}"
        steps[path.name] = lambda: maps.incoming(
            maps.policy(config.model), fill, Safetensors(path), (), dtype
        )
        fresh = {}
    # A merged export says rank 0: a rank here means that an adapter was written.
    if is_ours and config.lora.rank:
        factors = factor_shapes(shapes, config.lora)
        file = source / lora.FOLDER / lora.WEIGHTS
        steps[f"{lora.FOLDER}/{file.name}"] = lambda: maps.incoming(
            lora.adapter_rows(rows, factors, vlm), factors, Safetensors(file), (), dtype
        )
    parts = _all(steps)
    statistics = source / STATISTICS
    meta = {
        "config": to_dict(config),
        "statistics": read_json(statistics) if is_ours and statistics.is_file() else {},
        "action_specs": settings.get("action_specs", {}) if is_ours else {},
        "tokenizer": tokenizer_json(source, config),
        "origin": {"kind": "hf", **hf.origin(source)},
    }
    return _join(config, parts, meta, _random(model, config.seed, fresh, dtype))


def from_robovlms(
    checkpoint: str | Path,
    original: Mapping[str, Any],
    base: Mapping[str, Any],
    vlm: str | Path | None = None,
    statistics: Mapping[str, Any] | str | Path | None = None,
    dtype: np.dtype | None = None,
) -> Import:
    """A checkpoint of RoboVLMs and its JSON config.

    Args:
        checkpoint: .pt or .safetensors.
        original: their config.
        base: our raw config with defaults.
        vlm: Hugging Face folder of the VLM, for its config.json and tokenizer; None = the released
            architecture, no tokenizer.
        statistics: dataset -> entry of a dataset_statistics.json; or a file that
            `vla_jax.data.units.foreign_statistics` reads.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the file cannot be read.
        ConfigError: their config asks for what is not here, or statistics are missing.
    """
    config = resolve(robovlms.to_config(original, base))
    names = tuple(dataset.spec for dataset in config.data.datasets)
    entries = statistics or {}
    if isinstance(entries, str | Path):
        entries = read_statistics(entries, names)
    specs = released.action_specs(
        names, config.data.normalization, config.data.clip, config.model.action_dim, entries
    )
    alpha = original.get("train_setup", {}).get("lora_alpha")
    source = robovlms.open_source(checkpoint, alpha)
    # Some backbones' config.json lacks sizes, which are then read off these shapes.
    tensor_shapes = {name.removeprefix("backbone."): shape for name, shape in source.shapes.items()}
    _, config, shapes = complete(config, hf.read_arch(vlm, config.model, tensor_shapes), vlm)
    rows, ignore = maps.robovlms(config.model, prefix="")
    ignore = (*ignore, *robovlms.IGNORE)
    part = maps.incoming(rows, shapes, source, ignore, dtype, source.unequal())
    meta = {
        "config": to_dict(config),
        "statistics": {name: entries[name] for name in names if name in entries},
        "action_specs": {name: spec.to_json() for name, spec in specs.items()},
        "tokenizer": tokenizer_json(vlm, config) if vlm else "",
        "origin": {
            "kind": "robovlms",
            "config": dict(original),
            **(hf.origin(vlm) if vlm else {}),
        },
    }
    # Nothing starts at random: their file holds the whole policy.
    return _join(config, [part], meta, {})


def _settings(source: Path) -> dict[str, Any]:
    """What `exporting.to_hf` wrote beside the VLM."""
    settings = read_json(source / SETTINGS)
    groups = [key for key in ("config", "action_specs") if not isinstance(settings.get(key), dict)]
    if groups:
        raise ConfigError(f"{source / SETTINGS}: {groups} missing or no groups of keys")
    # The folder may come from an older version of this program.
    config = upgrade(settings["config"], settings.get("format"), str(source / SETTINGS))
    return {**settings, "config": config}


def _all(steps: Mapping[str, Callable[[], maps.Incoming]]) -> list[maps.Incoming]:
    """Every part of a checkpoint, or what is wrong with any of them."""
    parts, problems = [], []
    for name, step in steps.items():
        try:
            parts.append(step())
        except WeightError as error:
            problems.append(f"{name}:\n{error}")
    if problems:
        raise WeightError("\n".join(problems))
    return parts


def complete(
    config: Config, arch: dict[str, Any] | None, folder: str | Path | None
) -> tuple[vla.VLA, Config, dict[str, tuple[int, ...]]]:
    """The model, the config as checkpoints carry it, our path -> shape of every parameter.

    The config remembers the folder, for its tokenizer.
    """
    try:
        model = vla.build(config.model, arch)
        shapes = shapes_of(model)
    # A foreign config.json can break the model's code in many ways, all with one meaning.
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{folder or 'the config'}: no model can be made of its architecture ({error!r})"
        ) from error
    config = with_complete_arch(config, model.arch)
    # Absolute, as the next program may start in another folder.
    where = str(Path(folder).absolute()) if folder else ""
    backbone = dataclasses.replace(config.model.backbone, hf_dir=where)
    model_config = dataclasses.replace(config.model, backbone=backbone)
    return model, dataclasses.replace(config, model=model_config), shapes


# Of models met before: tracing one takes a second, and an import asks several times.
_SHAPES: dict[tuple[type, str], dict[str, tuple[int, ...]]] = {}


def shapes_of(model: vla.VLA) -> dict[str, tuple[int, ...]]:
    """Our path -> shape of every parameter; makes none of them."""
    # A model is its class, config and architecture; the last two hold dicts, which have no hash.
    key = (type(model), repr((model.config, model.arch)))
    if key not in _SHAPES:
        # Traced only: billions of parameters are described, none is allocated.
        tree = jax.eval_shape(functools.partial(vla.initial_params, model), jax.random.key(0))
        _SHAPES[key] = {path: tuple(leaf.shape) for path, leaf in rules.flatten(tree).items()}
    return dict(_SHAPES[key])


def _random(
    model: vla.VLA, seed: int, shapes: Mapping[str, Any], dtype: np.dtype | None
) -> dict[str, Lazy]:
    """The parameters a run with this seed would start with; the rest of the model is not made."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        flat = rules.flatten(vla.initial_params(model, key))
        # XLA drops what is not returned, so the VLM's random weights are never computed.
        return {path: flat[path] for path in shapes}

    @functools.cache
    def values() -> dict[str, jax.Array]:
        return jax.jit(make)(jax.random.split(jax.random.key(seed))[0])  # as in train.state.create

    # Training keeps its parameters in float32, whatever type it computes in.
    stored = dtype or np.dtype(np.float32)
    return {
        path: Lazy(shape, stored, lambda path=path: np.asarray(values()[path], stored))
        for path, shape in shapes.items()
    }


def tokenizer_json(folder: str | Path, config: Config) -> str:
    """The tokenizer of a Hugging Face folder as text; "" with a warning where there is none.

    Raises:
        WeightError: there is one that cannot be read.
    """
    try:
        tokenizer = hf.tokenizer(folder, config.model)
    except (FileNotFoundError, ImportError) as error:
        # Weights without a tokenizer are still worth having; only serving needs one.
        logger.warning("%s; the checkpoint can be converted, not trained from or served", error)
        return ""
    except ValueError as error:
        raise WeightError(f"the tokenizer cannot be read: {error}") from error
    rows = hf.vocab_size(config.model)
    beyond = tokenizer.beyond(rows)
    if beyond:
        logger.warning(
            "%s: the tokenizer has %d tokens beyond the %d rows of the model's vocabulary, such as "
            "%s: prompts that hold one are refused. Is it this model's tokenizer?",
            folder, len(beyond), rows, beyond[:5],
        )  # fmt: skip
    return tokenizer.to_json()


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
