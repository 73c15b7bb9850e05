"""The files of an OpenVLA or OpenVLA-OFT folder as one source of tensors.

| file | holds |
|---|---|
| model*.safetensors, pytorch_model*.bin | the VLM, LoRA merged |
| lora_adapter/ | PEFT's adapter, where the VLM is not there: then it is added to a base |
| action_head--N_checkpoint.pt | the L1 head |
| proprio_projector--N_checkpoint.pt | the state's token |
| vision_backbone--N_checkpoint.pt | the towers with FiLM, and with LoRA factors beside them |

Names of the .pt files may begin with `module.`, as data-parallel training leaves them. Code in a
folder is not looked at.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_jax.config import ConfigError, ModelConfig, read_json
from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.convert.hf import source as hf
from vla_jax.convert.openvla import names
from vla_jax.convert.robovlms.source import Canonical
from vla_jax.convert.tensors import Joined, Renamed, Source, Without
from vla_jax.models.weights import WeightError

ADAPTER = "lora_adapter"
# Of OFT's training: alpha is the rank, but at most this.
_ALPHA = 16
_WRAPPED, _FACTOR = "module.", ".lora_A."


@dataclass(frozen=True)
class Opened:
    """A folder, its files found and described, no tensor read.

    Attributes:
        tensors: all of them, by their names in `names.rows`.
        vlm: the folder that config.json and the tokenizer are read from.
        parts: part -> name of its file.
        wrapped: the parts whose names begin with `module.`.
        factors: modules of the towers with LoRA factors beside them -> rank.
    """

    tensors: Source
    vlm: Path
    parts: dict[str, str] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()
    factors: dict[str, int] = field(default_factory=dict)


def open_folder(root: Path, config: ModelConfig, base: Path | None = None) -> Opened:
    """Finds the files of a folder.

    Args:
        root: the folder.
        config: the model.
        base: folder of the VLM that an adapter in `root` is added to; None = the one that the
            adapter names, if it is a folder here.

    Raises:
        WeightError: there are no weights, several files of one part, or damaged ones.
        ConfigError: the adapter's base is not to be found, or a part is of another kind of model.
    """
    if not root.is_dir():
        raise WeightError(f"{root}: no such folder")
    if diffusion := _part(root, "noisy_action_projector"):
        raise ConfigError(f"{diffusion}: the head is a diffusion model, which is not here; L1 is")
    vlm, tensors = _vlm(root, config, base)
    parts, wrapped, factors, sources = {}, [], {}, []
    for part in (names.HEAD, names.STATE, names.VISION):
        path = _part(root, part)
        if path is None:
            continue
        parts[part], file = path.name, TorchFile(path)
        if any(name.startswith(_WRAPPED) for name in file.shapes):
            wrapped.append(part)
        if part == names.VISION:
            # The whole of the towers, so the VLM's own, without FiLM, are not wanted.
            tensors = Without(tensors, f"{names.VISION}.")
            factors = {
                name.split(_FACTOR)[0].removeprefix(_WRAPPED): shape[0]
                for name, shape in file.shapes.items()
                if _FACTOR in name
            }
            alpha = min(_ALPHA, *factors.values()) if factors else None
            # The empty pattern fits every name, which gets the prefix in front.
            sources.append(Renamed(Canonical(file, alpha), [("", f"{names.VISION}.")]))
        else:
            sources.append(Renamed(file, [(r"(?:module\.)?", f"{part}/")]))
    # The parts stand first, as a name means the first source that has it.
    return Opened(Joined([*sources, tensors]), vlm, parts, tuple(wrapped), factors)


def _part(root: Path, name: str) -> Path | None:
    """The file of a part; None where there is none."""
    files = sorted(root.glob(f"{name}--*checkpoint.pt"))
    if len(files) > 1:
        raise WeightError(f"{root}: several files of {name}, {[p.name for p in files]}: leave one")
    return files[0] if files else None


def _vlm(root: Path, config: ModelConfig, base: Path | None) -> tuple[Path, Source]:
    """The folder of the VLM, and its tensors with the adapter added where there is one."""
    adapter = root / ADAPTER
    is_whole = any(root.glob(f"model*{SUFFIX}")) or any(root.glob("pytorch_model*.bin"))
    if is_whole or not adapter.is_dir():
        return root, hf.open_source(root, config)
    settings = read_json(adapter / "adapter_config.json")
    named = settings.get("base_model_name_or_path")
    vlm = base or (Path(named) if named and Path(named).is_dir() else None)
    if vlm is None:
        raise ConfigError(
            f"{root}: holds an adapter alone, of {named!r}: name the folder of that VLM, --base=DIR"
        )
    # PEFT puts the two attributes of its wrapper before every name.
    factors = Renamed(
        Safetensors(adapter / f"adapter_model{SUFFIX}"), [(r"base_model\.model\.", "")]
    )
    joined = Joined([hf.open_source(vlm, config), factors])
    return vlm, Canonical(joined, _alpha(settings, adapter))


def _alpha(settings: dict[str, Any], adapter: Path) -> float:
    """The scale of an adapter times its rank."""
    # Each of these changes the factors' scale or what they are added to.
    other = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    wrong = [key for key, plain in other.items() if settings.get(key, plain) not in (plain, None)]
    alpha = settings.get("lora_alpha")
    if wrong or not isinstance(alpha, int | float):
        problem = f"{wrong} are not supported" if wrong else "lora_alpha is missing"
        raise ConfigError(f"{adapter}: {problem}; merge the adapter with PEFT")
    return float(alpha)
