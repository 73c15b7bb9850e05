"""What a backbone file offers, and the helpers they share.

A backbone is a module (file) with: `ARCH`, `LAYOUT`, `PROMPT`, `IGNORE`, `arch(overrides)`,
`image_spec(config)`, `width(config)`, `image_tokens(config)`, `vocab_size(config)`,
`token_end(config)`, `weight_map()` and a Linen module with `encode_images`, `embed_text`,
`__call__(embeds, valid)`, `logits`, `empty_cache(batch, slots)` and `extend(embeds, valid, cache)`.
It may have `REFUSED`: the structures it cannot take -> the reason. `backbones/__init__.py` lists
them.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Where images and actions enter the prompt.

    Attributes:
        bos: text columns before the images (1 if the tokenizer has a start token, else 0).
        eos: text columns after the action tokens (1 if it has an end token, else 0).
    """

    bos: int
    eos: int


def merge_arch(
    base: Mapping[str, Any], overrides: Mapping[str, Any], strict: bool
) -> dict[str, Any]:
    """`base` with the values of `overrides`.

    Args:
        base: every key the backbone reads, with the released model's values.
        overrides: same nesting; a whole config.json or a user's changes.
        strict: refuse keys `base` lacks. Off for a config.json, which carries many keys that
            neither shapes nor numbers depend on.

    Raises:
        ValueError: listing every unknown key, wrong nesting and a foreign model_type.
    """
    problems: list[str] = []
    merged = _merge(base, overrides, "", strict, problems)
    if problems:
        raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
    return merged


def _merge(
    base: Mapping[str, Any],
    overrides: Mapping[str, Any],
    path: str,
    strict: bool,
    problems: list[str],
) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    for key, value in overrides.items():
        if key not in base:
            if strict:
                near = difflib.get_close_matches(key, base, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"legal keys: {sorted(base)}"
                problems.append(f"{path}{key}: unknown key; {hint}")
        elif isinstance(base[key], Mapping):
            if isinstance(value, Mapping):
                merged[key] = _merge(base[key], value, f"{path}{key}.", strict, problems)
            else:
                problems.append(f"{path}{key}: expected a group of keys, not {value!r}")
        elif key == "model_type" and not path and value != base[key]:
            problems.append(f"model_type: the files are of {value!r}, expected {base[key]!r}")
        else:
            merged[key] = value
    return merged
