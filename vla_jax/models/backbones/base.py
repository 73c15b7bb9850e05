"""What a backbone file offers, and the helpers they share.

A backbone is a module (file) with: `DEFAULT_CONFIG` (the file in configs/ that such a VLM is
imported with unless another is named), `ARCH`, `LAYOUT`, `PROMPT`, `IGNORE`, `arch(overrides)`,
`image_spec(config)`, `width(config)`, `token_width(config)`, `image_tokens(config)`,
`vocab_size(config)`, `token_end(config)`, `weight_map(config)` and a Linen module (config, remat,
dtype) with `encode_images(images)`, `embed_text(ids)`, `__call__(tokens)`, `logits(hidden)`,
`empty_cache(batch, slots)` and `extend(tokens, cache)`. `config` is the complete architecture.

It may have:
    REFUSED: the structures it cannot take -> the reason.
    refusal(config, structure): why this architecture cannot take a StructureConfig, or "".
    ORIGINAL_LAYOUT: where RoboVLMs puts images and actions, if elsewhere.
    MARKS: how many of an image's tokens, on either side, are no part of it; no resampler sees them.
    QUESTION: how it is asked a {question} that it answers in tokens, if not as RoboVLMs does.
    ENDS: what captions begin and end with, in which case the tokenizer adds nothing to any text,
        and PROMPT and QUESTION spell out all they need.
    ADDED_TOKENS: special tokens its tokenizer gets if it lacks them, in the order of their ids.
    from_shapes(shapes): what the shapes of the tensors (under the weight map's names) tell of the
        architecture that its config.json need not say, {} if they are not of this backbone.
    RENAMES: (pattern, replacement) pairs that turn names other versions of transformers write into
        those of the weight map.
    PARTS: further files of weights in its Hugging Face folder; they come before the model's own.
    robovlms_map(config): the weight map of RoboVLMs' checkpoints, if their names differ.
    ROBOVLMS_ROOT: what stands before those names, if not "backbone.".
Its module may have `features(tokens)`: the hidden states that heads read, if not those of
`__call__`, which `logits` takes.

`backbones/__init__.py` lists them.

Legend: b batch · n sequence · k image tokens · t prompt columns · e token width (`token_width`;
of "crossed" images another than the sequence's)
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Layout:
    """Where images and actions enter the prompt.

    Attributes:
        bos: text columns before the images (1 if the tokenizer has a start token, else 0; more
            where a chat begins with several).
        eos: text columns after the action tokens (1 if it has an end token, else 0).
        images: "spliced", they stand in the sequence; "crossed", it attends to them from between
            its layers; "encoded", an encoder reads them and the prompt, and the sequence is what
            the decoder writes after the prompt's first column.
    """

    bos: int
    eos: int
    images: str = "spliced"


class Tokens(NamedTuple):
    """What a VLM reads.

    Attributes:
        embeds: the sequence, of `encode_images` and `embed_text`.
        valid: False on padding.
        place: which of its image's tokens (0, 1, ...) a column is; -1 for text and all else.
        images: tokens that are not in the sequence ("crossed", "encoded"); of `extend`, only the
            first call for a sequence gets them.
        seen: which of them exist.
        prompt: the text an encoder reads ("encoded"), like `images`.
        prompt_valid: False on its padding.
        image_place: `place` of the images ("encoded"), the same in all rows.
        given: True on images and prompt up to the action tokens, False on those, on what is written
            and on what stands behind: the prefix of a prefix-LM. None: nothing of it is prefix.
    """

    embeds: Float[Array, "b n e"]
    valid: Bool[Array, "b n"]
    place: Int[Array, "b n"]
    images: Float[Array, "b k e"] | None = None
    seen: Bool[Array, "b k"] | None = None
    prompt: Float[Array, "b t e"] | None = None
    prompt_valid: Bool[Array, "b t"] | None = None
    image_place: Int[Array, " k"] | None = None
    given: Bool[Array, "b n"] | None = None


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


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Layers among the names `<prefix>0.…`, `<prefix>1.…`, ...

    Raises:
        ValueError: there is none.
    """
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return 1 + max(int(number) for number in numbers)


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
