"""May a run go on under this config? What a resumed run may change, and what it may not."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from vla_jax.config import Config, ConfigError

logger = logging.getLogger(__name__)

# Where a resumed run's config may differ from the stored one without a word: nothing here
# changes what the run computes. `[i]` stands for any index.
MACHINE = (
    "mesh", "train.log_every", "train.eval_every", "train.eval_batches", "train.check_epochs",
    "train.save_every",
    "train.keep", "train.tensorboard", "train.wandb", "train.max_skipped", "train.profile",
    "train.compilation_cache", "train.keep_heap", "data.threads", "data.prefetch",
    "data.cache_dir", "data.index", "data.datasets[i].dir", "data.cotrain.path",
    "data.statistics",  # the checkpoint has them
    "data.on_error",  # left-out episodes change the digest, which the loader checks
    "data.cotrain.images", "model.backbone.hf_dir", "model.fast.dir", "model.remat",
)  # fmt: skip
# Where it may not: the weights, the moments or the sample stream would not fit.
FIXED = ("seed", "model", "data", "lora", "optim.frozen", "optim.trained")


def check_resume(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare a stored config with the current one, both as nested dicts.

    Returns:
        Differences that are allowed but change the run from here on (for a warning).

    Raises:
        ConfigError: listing every difference in what must stay: model, data, seed, frozen.
    """
    # Through JSON, so that a tuple equals the list it was stored as.
    old, new = (_leaves(json.loads(json.dumps(tree))) for tree in (stored, current))
    refused, noted = [], []
    for key in sorted({**old, **new}):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if a == b or _under(key, MACHINE):
            continue
        (refused if _under(key, FIXED) else noted).append(f"{key}: stored {a!r}, now {b!r}")
    if refused:
        raise ConfigError(
            "the run in this workdir was started with another config; use its values or another "
            "--workdir:\n  " + "\n  ".join(refused)
        )
    return noted


def as_begun(config: Config, stored: Mapping[str, Any]) -> Config:
    """The config with what a resumed run keeps, whatever the config file says now.

    Args:
        config: as it is given now.
        stored: nested dict, of the checkpoint the run goes on from.
    """
    freeze = stored["lora"]["freeze"]
    if config.lora.rank and freeze != config.lora.freeze:
        logger.warning("lora.freeze stays %s, as this run began", freeze)
    # The tokenizers were read when the run began; the config file names their folder at most.
    code = stored["model"].get("fast", {}).get("code", {})
    fast = dataclasses.replace(config.model.fast, code=code)
    return dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, freeze=freeze),
        model=dataclasses.replace(config.model, fast=fast),
    )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        parts = [_leaves(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()]
    elif isinstance(tree, list) and any(isinstance(v, dict) for v in tree):
        parts = [_leaves(v, f"{prefix}[{i}]") for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for part in parts for key, value in part.items()}


def _under(key: str, groups: tuple[str, ...]) -> bool:
    key = re.sub(r"\[\d+\]", "[i]", key)
    return any(key == group or key.startswith((group + ".", group + "[")) for group in groups)
