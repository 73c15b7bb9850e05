"""The structural facts of a text decoder."""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.layers import Rope

POSITIONS = ("none", "sinusoid", "learned")


@dataclass(frozen=True)
class DecoderSpec:
    """The structural facts of a decoder; a backbone's file reads them off its `text_config`.

    Attributes:
        vocab: rows of the token table.
        width: of the residual stream.
        layers: depth.
        block: what each layer is made of; its norm kind is the final norm's too.
        rope: rotary positions, if any.
        alibi: largest exponent of ALiBi's slopes (8 for MPT), if any.
        positions: what is added to the embeddings: none | sinusoid | learned.
        max_positions: rows of the learned table.
        first_position: row of the first token (2 for OPT and Kosmos-2).
        count_padding: by default a token's position is its column; if False, padding is not
            counted and itself stands before the first token.
        window: a token of a local layer sees this many tokens back, itself included.
        local: which layers are local, one flag each.
        embed_scale: factor on everything that enters: text, images and actions alike.
        round_scale: the factor is first rounded to the activations' dtype (Gemma).
        embed_dropout: rates, applied one after the other.
        tied: the token table is the output matrix too.
        head_bias: bias on the scores.
        norm_in_head: hidden states are handed out before the final norm, which `logits` applies.
        logit_cap: scores are squashed to +- this by tanh (Gemma-2).
    """

    vocab: int
    width: int
    layers: int
    block: BlockSpec
    rope: Rope | None = None
    alibi: float | None = None
    positions: str = "none"
    max_positions: int = 0
    first_position: int = 0
    count_padding: bool = True
    window: int | None = None
    local: tuple[bool, ...] = ()
    embed_scale: float = 1.0
    round_scale: bool = False
    embed_dropout: tuple[float, ...] = ()
    tied: bool = True
    head_bias: bool = False
    norm_in_head: bool = False
    logit_cap: float | None = None

    def __post_init__(self):
        problems = []
        if self.positions not in POSITIONS:
            problems.append(f"positions: {self.positions!r} is none of {list(POSITIONS)}")
        if self.positions == "learned" and self.max_positions <= 0:
            problems.append("max_positions: a learned table needs its number of rows")
        # One without the other would be ignored without a word.
        if (self.window is None) != (not any(self.local)):
            problems.append("window and local: give both or neither")
        if self.local and len(self.local) != self.layers:
            problems.append(f"local: {len(self.local)} flags for {self.layers} layers")
        # With an explicit head width the heads need not fill the width.
        if self.block.head_width is None and self.width % self.block.heads:
            problems.append(f"block.heads: {self.block.heads} does not divide width {self.width}")
        if problems:
            raise ValueError("decoder:\n  " + "\n  ".join(problems))

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.block.head_width or self.width // self.block.heads


@dataclass(frozen=True)
class Insert:
    """A module of one's own before every `every`-th layer, e.g. Flamingo's cross-attention.

    Attributes:
        every: distance in layers; the first stands before layer number `every`, counted from 1.
        make: builds the module, which is called as `module(x, context) -> x`.
    """

    every: int
    make: Callable[[], nn.Module]
