"""What a run starts from: nothing, a Hugging Face folder, a checkpoint, or where it stopped."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.convert import lora, store
from vla_jax.convert.hf import source as hf
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.weights import KeyReport, WeightError, ignored

logger = logging.getLogger(__name__)

_VLM = "backbone/"


class Start:
    """The architecture, tokenizer and weights a run begins with.

    Args:
        config: of the model to train; `backbone.hf_dir` may name a Hugging Face folder.
        checkpoint: workdir of another run or of launch/convert.py; comes before `hf_dir`. All its
            weights are taken, the head's too, as far as they fit: the VLM's must, the others are
            made anew for another robot or another head.
        resumed: what the newest checkpoint of the run itself carries beside the weights, if the
            run goes on from there. Neither `hf_dir` nor `checkpoint` is opened then: they may be
            gone.

    Raises:
        CheckpointError: no usable checkpoint there.
        ConfigError: it is of another backbone.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: str | Path | None = None,
        resumed: Mapping[str, Any] | None = None,
    ):
        self._config, self._resumed = config, resumed
        self._stored = store.Stored(checkpoint) if checkpoint and not resumed else None
        self._where = str(checkpoint or config.backbone.hf_dir)
        if self._where and not (resumed or self._stored or Path(self._where).is_dir()):
            raise ConfigError(f"model.backbone.hf_dir: {self._where}: no such folder")
        if self._stored:
            name = self._stored.meta["config"]["model"]["backbone"]["name"]
            if name != config.backbone.name:
                raise ConfigError(
                    f"model.backbone.name: {config.backbone.name!r}, and {checkpoint} holds a "
                    f"{name!r}; set it to that, or start from another checkpoint"
                )

    def arch(self) -> dict[str, Any] | None:
        """The backbone's complete architecture; None leaves it to the config."""
        if self._resumed:
            return self._resumed_arch(self._resumed)
        if self._stored:
            backbone = BACKBONES[self._config.backbone.name]
            base = self._stored.meta["config"]["model"]["backbone"]["arch"]
            return hf.override(base, self._config.backbone.arch, backbone)
        return hf.read_arch(self._where, self._config) if self._where else None

    def _resumed_arch(self, meta: Mapping[str, Any]) -> dict[str, Any] | None:
        stored = meta["config"]["model"]["backbone"]
        from_weights = self._where or stored["hf_dir"] or meta.get("origin")
        if not from_weights or stored["name"] != self._config.backbone.name:
            # The config has to say the same again; `train.resume` lists where it does not.
            return None
        return hf.override(stored["arch"], self._config.backbone.arch, BACKBONES[stored["name"]])

    def origin(self) -> dict[str, Any]:
        """What checkpoints of the run keep of the folder its VLM came from, to export it again."""
        if self._stored:
            return self._stored.meta.get("origin", {})
        return {"kind": "hf", **hf.origin(self._where)} if self._where else {}

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer the weights were trained with; None if there are no weights.

        Raises:
            ConfigError: the checkpoint was imported without one.
            FileNotFoundError: nor has the folder one.
        """
        if self._stored:
            try:
                return Tokenizer.from_json(self._stored.meta["tokenizer"])
            except ValueError as error:
                raise ConfigError(f"{self._where}: {error}") from error
        return hf.tokenizer(self._where, self._config) if self._where else None

    def fast_code(self) -> dict[str, Any]:
        """How the weights write a chunk, see `answers`; {} where they do not."""
        if not self._stored:
            return {}
        return self._stored.meta["config"]["model"].get("fast", {}).get("code", {})

    def load(
        self, shapes: Mapping[str, tuple[int, ...]], place: Callable[[str, np.ndarray], Any]
    ) -> dict[str, Any]:
        """The weights, one parameter in host memory at a time; {} if there are none.

        Args:
            shapes: our path -> shape of every parameter of the model.
            place: (our path, array) -> what to keep.

        Raises:
            WeightError: with everything of the VLM that does not fit, or of the whole model where
                the weights are a Hugging Face folder's.
        """
        if not self._stored:
            if not self._where:
                return {}
            return hf.load(self._where, self._config, shapes, place)
        leaves = self._stored.leaves
        settings = self._stored.meta["config"].get("lora", {})
        if any(lora.is_factor(path) for path in leaves):
            # A new run trains factors of its own; those of the old one become part of the kernels.
            leaves = lora.merged(leaves, settings["alpha"] / settings["rank"])
        added = BACKBONES[self._config.backbone.name].FRESH

        def of_vlm(path: str) -> bool:
            return path.startswith(_VLM) and not ignored(path, added)

        # The VLM has to fit as a whole: a part of it left random would go unnoticed.
        vlm = _report(leaves, shapes, of_vlm)
        if vlm:
            raise WeightError(f"{self._where}:\n{vlm}")
        mismatches = _report(leaves, shapes, lambda path: not of_vlm(path))
        # No error: another robot or head is what such weights are often wanted for.
        if mismatches:
            logger.warning(
                "%s is of another robot, structure or head. What is missing or of another shape "
                "starts anew, what is unexpected is left out:\n%s", self._where, mismatches,
            )  # fmt: skip
        fit = {p: x for p, x in leaves.items() if p in shapes and x.shape == tuple(shapes[p])}
        return {path: place(path, leaf.read()) for path, leaf in fit.items()}


def _report(
    leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], counts: Callable[[str], bool]
) -> KeyReport:
    """The stored parameters that do not fit the model's, and those it lacks."""
    return KeyReport(
        missing=tuple(path for path in shapes if counts(path) and path not in leaves),
        unexpected=tuple(path for path in leaves if counts(path) and path not in shapes),
        misshaped=tuple(
            f"{path}: {list(leaf.shape)}, the model has {list(shapes[path])}"
            for path, leaf in leaves.items()
            if counts(path) and path in shapes and leaf.shape != tuple(shapes[path])
        ),
    )
