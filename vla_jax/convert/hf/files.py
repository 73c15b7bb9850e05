"""What stands beside the weights in a Hugging Face folder: config, tokenizer and processor.

Files of the folder a model came from are copied; the small ones travel inside its checkpoint, so
that they are there when the folder is gone. What neither has is written from the model itself.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vla_jax.config import read_json
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.image import ImageSpec

# Settings that do not change with the weights; the tokenizer itself has a place of its own.
_CARRIED = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip
# Too large for a checkpoint, or code.
_COPIED = (
    *_CARRIED, "tokenizer*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.py",
    "LICENSE*",
)  # fmt: skip
_MAX_CARRIED = 4 * 2**20  # bytes of a file
# PIL's number of each filter, as image processors store it.
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
# Special tokens -> where a config.json names their ids.
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}


def carried(folder: str | Path) -> dict[str, str]:
    """Name -> text of the files that travel inside a checkpoint."""
    texts = {}
    for path in _matching(Path(folder), _CARRIED):
        if path.stat().st_size <= _MAX_CARRIED:
            texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def place(source: Path | None, texts: Mapping[str, str], folder: Path) -> None:
    """Put tokenizer, processor and code files into `folder`.

    Args:
        source: folder the model came from, if it is still there.
        texts: of `carried`, to take if it is not; those that ask for code that is not here are
            left out.
        folder: to fill.
    """
    if source:
        for path in _matching(source, _COPIED):
            shutil.copyfile(path, folder / path.name)
        return
    for name, text in texts.items():
        # The checkpoint may be a stranger's: only files of expected names are written.
        if any(fnmatch(name, pattern) for pattern in _CARRIED) and not _asks_for_code(text):
            (folder / name).write_text(text, encoding="utf-8")


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})


def _asks_for_code(text: str) -> bool:
    """Whether a settings file names classes of Python files beside it (not of a hub repository)."""
    try:
        named = json.loads(text).get("auto_map", {}).values()
    except (ValueError, AttributeError):  # chat templates are no JSON
        return False
    classes = [x for entry in named for x in (entry if isinstance(entry, list) else [entry]) if x]
    # `REPOSITORY--module.Class` is loaded from the hub, a plain name from a file beside it.
    return any("--" not in x for x in classes)


def config_json(arch: Mapping[str, Any], original: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The VLM's config.json.

    Args:
        arch: the architecture the weights have.
        original: config.json the model came with, {} if it is not known: transformers has defaults
            for what `arch` does not say.
        dtype: of the weights.
    """
    merged = _merge(original, arch)
    # "dtype" since transformers 5; both read the older name.
    merged.pop("dtype", None)
    return {**merged, "torch_dtype": dtype}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping)
        # A config.json may hold null in a group's place.
        merged[key] = _merge(base.get(key) or {}, value) if nested else value
    return merged


def write_tokenizer(tokenizer: str, original: Mapping[str, Any], folder: Path) -> None:
    """Tokenizer files that `AutoTokenizer` loads, where the folder lacks them.

    Args:
        tokenizer: the one inside a checkpoint.
        original: config.json the model came with, {} if it is not known: names special tokens that
            the tokenizer does not name itself.
        folder: to complete.
    """
    definition = json.loads(Tokenizer.from_json(tokenizer).to_json())
    if not _matching(folder, ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")):
        # Padding and truncation were the training run's; transformers sets its own.
        write_json(folder / "tokenizer.json", {**definition, "padding": None, "truncation": None})
    # One that was copied from the original names the special tokens itself.
    if (folder / "tokenizer_config.json").is_file():
        return
    roles = _roles(definition, original)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**settings, **roles})
    if not (folder / "special_tokens_map.json").is_file():
        write_json(folder / "special_tokens_map.json", roles)


def _roles(tokenizer: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that start, end and pad a text, and the one that stands for unknown pieces."""
    added = {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens") or ()}
    # Configs of VLMs keep the language model's ids one level down.
    text = {**(original.get("text_config") or {}), **original}
    roles = {}
    for role, key in _ROLES.items():
        ids = text.get(key)
        # transformers allows a list of ids for one role.
        number = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(number, int) and number in added:
            roles[role] = added[number]
    # What the tokenizer does comes before what a config says.
    before, after = _template(tokenizer.get("post_processor") or {})
    roles |= {"bos_token": before[0]} if before else {}
    roles |= {"eos_token": after[-1]} if after else {}
    padding = (tokenizer.get("padding") or {}).get("pad_token")
    roles |= {"pad_token": padding} if padding in added.values() else {}
    unknown = tokenizer["model"].get("unk_token")
    return roles | ({"unk_token": unknown} if unknown else {})


def _template(processor: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Special tokens before and after a single text."""
    before: list[str] = []
    after: list[str] = []
    for step in processor.get("processors") or [processor]:
        side = before
        for piece in step.get("single") or ():
            if "Sequence" in piece:
                side = after
            else:
                side.append(piece["SpecialToken"]["id"])
    return before, after


def write_processor(image: ImageSpec, tokens: int, config: Mapping[str, Any], folder: Path) -> None:
    """Processor files that `AutoProcessor` loads, where the folder lacks them.

    Args:
        image: what the image tower takes.
        tokens: that an image becomes.
        config: config.json of the folder.
        folder: to complete.
    """
    path = folder / "processor_config.json"
    processor = read_json(path) if path.is_file() else {}
    if not (folder / "preprocessor_config.json").is_file() and "image_processor" not in processor:
        settings = {**preprocessor(image), **_processor_class(config), "image_seq_length": tokens}
        settings |= _cutting(image, config.get("vision_config") or {})
        write_json(folder / "preprocessor_config.json", settings)
    strategy = config.get("vision_feature_select_strategy")
    patch = (config.get("vision_config") or {}).get("patch_size")
    # Only processors that count an image's tokens themselves have these settings.
    if not processor and strategy and patch:
        height, width = image.shape
        # transformers' "default" drops the class token of the tower's output.
        dropped = 1 if strategy == "default" else 0
        # What exceeds the patches are tokens the tower adds, such as the class token.
        extra = tokens + dropped - (height // patch) * (width // patch)
        counting = {"patch_size": patch, "vision_feature_select_strategy": strategy}
        write_json(path, {**counting, "num_additional_image_tokens": extra})


def _processor_class(config: Mapping[str, Any]) -> dict[str, str]:
    """The class as transformers names it: PaliGemmaFor... -> PaliGemmaProcessor."""
    name, separator, _ = (config.get("architectures") or [""])[0].partition("For")
    return {"processor_class": f"{name}Processor"} if separator and "auto_map" not in config else {}


def _cutting(image: ImageSpec, vision: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of processors that cut the patches themselves, for towers that merge neighbors.

    They keep the aspect ratio and take the number of pixels: the same for square cameras.
    """
    if "spatial_merge_size" not in vision:
        return {}
    pixels = image.shape[0] * image.shape[1]
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "min_pixels": pixels,
        "max_pixels": pixels,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }


def preprocessor(image: ImageSpec) -> dict[str, Any]:
    """preprocessor_config.json of the processor that does what `image` says.

    Left out, as no processor has it: a `background` other than the mean, `larger` sizes.
    """
    height, width = image.shape
    shape = {"height": height, "width": width}
    shorter = {"shortest_edge": image.shortest or min(image.shape)}
    sizes: dict[str, Any] = {"size": shape, "do_center_crop": False}
    if image.fit in ("crop", "pad"):
        sizes = {"size": shorter, "do_center_crop": True, "crop_size": shape}
    if image.fit == "pad":
        sizes |= {"do_pad": True}
    return {
        "image_processor_type": f"{'Llava' if image.fit == 'pad' else 'CLIP'}ImageProcessor",
        "do_resize": True,
        **sizes,
        "resample": _RESAMPLE[image.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
