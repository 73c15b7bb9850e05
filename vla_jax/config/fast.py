"""The options of actions that the VLM writes as FAST tokens; the defaults are pi0-FAST's."""

from dataclasses import dataclass
from typing import Any

from vla_jax.config.option import group, option


@dataclass(frozen=True)
class FastParity:
    """What a policy that writes FAST tokens does only to repeat openpi."""

    vocabulary: str = option(
        "chunks",
        "chunks: the answer is begun for the model, and only tokens that can still become a whole "
        "chunk are chosen; all: any token, as in openpi, so that an answer may be none.",
        "chunks",
        "all",
    )
    skipped_position: bool = option(
        False,
        "In decoding the first written token stands one position later than in training, as in "
        "openpi; needs vocabulary 'all'.",
    )


@dataclass(frozen=True)
class FastConfig:
    """How a chunk is written: head `fast`, and `expert` whose VLM writes beside the expert."""

    dir: str = option(
        "",
        "Folder of the FAST tokenizer, the universal one or launch/fit_fast.py's; a checkpoint "
        "brings its own.",
    )
    # As many tokens as openpi decodes at most.
    length: int = option(
        256,
        "Tokens of an answer at most, its first and last words' included; launch/fit_fast.py says "
        "how many the chunks of a dataset take.",
    )
    prompt: str = option(
        "pi0fast",
        "Form of the prompt, see vla_jax/data/language/prompts.py; pi05 and pi0fast have the "
        "robot's state in it, with pi0 a state is a token before the instruction.",
        "pi0",
        "pi05",
        "pi0fast",
    )
    images: str = option(
        "openpi",
        "How images are resized. openpi: with black margins, by Pillow's bilinear filter; "
        "backbone: as the VLM's own processor does.",
        "openpi",
        "backbone",
    )
    blank: int = option(
        0, "Black images behind the cameras', as openpi gives pi0-FAST for cameras a robot lacks."
    )
    # As in openpi, whose decoding is greedy by default.
    temperature: float = option(0.0, "Of the choice of tokens in decoding; 0 = the likeliest one.")
    token_end: int = option(
        0, "First id above those that stand for FAST tokens; 0 = the backbone's own."
    )
    code: dict[str, Any] = option(
        {}, "The tokenizer and the ids of an answer's words; filled in when a run starts."
    )
    parity: FastParity = group(FastParity)
