"""Where the modules of version 0.1 are now, so that programs that import them there go on.

Specs of datasets and conversion scripts live for years beside the data they describe. An old path
imports the module that has taken its place, the same object, with a warning that names the new one.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOME = "vla_jax."
# Module of version 0.1 -> what it is now; both below vla_jax.
MODULES = {
    "batched_step": "inference.batched_step",
    "config_checks": "config.checks",
    "convert.hf_files": "convert.hf.files",
    "convert.released": "convert.robovlms.released",
    "convert.robovlms_config": "convert.robovlms.config",
    "convert.robovlms_keys": "convert.robovlms.keys",
    "convert.safetensors_io": "convert.formats.safetensors",
    "convert.torch_read": "convert.formats.torch_read",
    "convert.torch_write": "convert.formats.torch_write",
    "data.calvin_frames": "data.calvin.frames",
    "data.calvin_spans": "data.calvin.annotations",
    "data.captions": "data.language.captions",
    "data.crc32c": "data.rlds.crc32c",
    "data.gripper": "data.units.gripper",
    "data.instructions": "data.language.instructions",
    "data.lerobot_meta": "data.lerobot.meta",
    "data.lerobot_video": "data.lerobot.video",
    "data.normalize": "data.units.normalize",
    "data.records": "data.rlds.records",
    "data.rlds_build": "data.rlds.build_index",
    "data.rlds_index": "data.rlds.index",
    "data.source_spans": "data.source_annotated",
    "data.source_write": "data.rlds.convert",
    "data.sources": "data.formats",
    "data.standardise": "data.standardize",
    "data.statistics_files": "data.units.foreign_statistics",
    "data.stats": "data.units.statistics",
    "data.stream": "data.stream_order",
    "data.stream_given": "data.given",
    "data.stream_records": "data.rlds.stream",
    "data.stream_source": "data.source_streamed",
    "data.text": "data.language.tokenizer",
    "data.tiktoken": "data.language.qwen_tiktoken",
    "data.trajectory": "data.sampler",
    "data.writer": "data.rlds.writer",
    "execution": "inference.execution",
    "models.block": "models.towers.block",
    "models.captions": "models.caption_loss",
    "models.clip_text": "models.towers.clip_text",
    "models.decoder": "models.towers.decoder",
    "models.decoder_spec": "models.towers.decoder_spec",
    "models.encoder_decoder": "models.towers.encoder_decoder",
    "models.gated": "models.towers.gated",
    "models.language": "models.towers.text_families",
    "models.language_weights": "models.towers.text_weights",
    "models.layers": "models.towers.layers",
    "models.normformer": "models.towers.normformer",
    "models.positions": "models.towers.positions",
    "models.resampler": "models.towers.resampler",
    "models.resnet": "models.towers.resnet",
    "models.state": "models.state_token",
    "models.tiles": "models.towers.tiles",
    "models.vit": "models.towers.vit",
    "policy": "inference.policy",
    "provenance": "inference.provenance",
    "serve.json_wire": "serve.json_numpy",
    "serve.protocol": "inference.protocol",
    "serve.wire": "serve.msgpack_numpy",
}
# Modules of version 0.1 that remain, and what has the names now that stood in them.
NAMES = {
    "convert.hf": "convert.hf.source",
    "convert.robovlms": "convert.robovlms.source",
    "data.calvin": "data.calvin.source",
    "data.dataset": "data.open_dataset",
    "data.lerobot": "data.lerobot.source",
    "data.rlds.records": "data.rlds.records",
    "models.backbones.llava": "models.backbones.llava:Llava",
    "models.backbones.paligemma": "models.backbones.paligemma:PaliGemma",
    "models.structures": "models.structures.splicing",
    "models.towers": "models.towers.vision_families",
}
# Names of version 0.1 that are others now.
_RENAMED = {"data.rlds.records._fields": "message_fields"}


class _Finder(MetaPathFinder, Loader):
    """Answers for the old paths, which have no files."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A spec for the modules of the table only."""
        is_old = fullname.removeprefix(_HOME) in MODULES and fullname.startswith(_HOME)
        return ModuleSpec(fullname, self) if is_old else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the new module in the old one's place."""
        new = _HOME + MODULES[module.__name__.removeprefix(_HOME)]
        _warn(module.__name__, new)
        # The import system takes what a module leaves under its name.
        sys.modules[module.__name__] = importlib.import_module(new)


def register() -> None:
    """Makes the old paths importable; more than once is the same as once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module in `NAMES`: finds the names it had in version 0.1."""
    home, _, holder = NAMES[module.removeprefix(_HOME)].partition(":")

    def find(name: str) -> Any:
        # `from package import part` asks for the attribute before it imports the part.
        if not name.startswith("__") and not _is_part(module, name):
            new = importlib.import_module(_HOME + home)
            new_name = _RENAMED.get(f"{module.removeprefix(_HOME)}.{name}", name)
            value = vars(getattr(new, holder) if holder else new).get(new_name)
            if value is not None:
                _warn(f"{module}.{name}", ".".join(filter(None, (_HOME + home, holder, new_name))))
                return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def _is_part(module: str, name: str) -> bool:
    package = "__path__" in vars(sys.modules[module])
    return package and find_spec(f"{module}.{name}") is not None


def _warn(old: str, new: str) -> None:
    # The frames of the import system do not count.
    warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
