"""The shipped config that a VLM's Hugging Face folder is imported with."""

from pathlib import Path

from vla_jax.config import ConfigError, read_json
from vla_jax.models.backbones import BACKBONES


def default_config(hf_dir: str | Path) -> str:
    """Name of the config that the backbone of a Hugging Face folder names as its own.

    Args:
        hf_dir: holds a config.json, whose model_type (and, where backbones share one, whose other
            fields) tells the backbone.

    Returns:
        Such as "kosmos_ph", for configs/kosmos_ph.py.

    Raises:
        ConfigError: no backbone fits.
    """
    described = read_json(Path(hf_dir) / "config.json")
    kind, problems = described.get("model_type"), []
    # A backbone without a shipped config cannot be chosen by a folder alone.
    vlm_types = {b.RELEASED["model_type"] for b in BACKBONES.values() if b.DEFAULT_CONFIG}
    # Backbones may share a model_type; then the one whose `arch` takes the file is meant.
    for backbone in BACKBONES.values():
        if backbone.RELEASED["model_type"] != kind or not backbone.DEFAULT_CONFIG:
            continue
        try:
            # Not strict: a config.json has many keys that say nothing of the architecture.
            backbone.arch(described, strict=False)
        except ValueError as error:
            problems.append(str(error))
        else:
            return backbone.DEFAULT_CONFIG
    if problems:
        raise ConfigError(f"{hf_dir}: " + "\n".join(problems))
    raise ConfigError(
        f"{hf_dir}: no backbone is a VLM of type {kind!r}; they are {sorted(vlm_types)}"
    )
