"""Language models of Hugging Face as `DecoderSpec`s and weight maps, by `model_type`.

A spec is read off a `config.json` (or the `text_config` of a VLM) of any transformers version;
keys it lacks take the defaults of the Hugging Face class. A weight map names the tensors of the
`...ForCausalLM`; a VLM that wraps one adds its own prefix with `weights.prefixed`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vla_jax.models.towers import text_weights as names
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Rope
from vla_jax.models.weights import Weight

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Language:
    """One family.

    Attributes:
        spec: config -> structural facts. Raises ValueError for a variant that is not supported.
        weights: facts -> rows; targets are relative to the decoder.
        ignore: regexes of names that carry nothing.
    """

    spec: Callable[[Config], DecoderSpec]
    weights: Callable[[DecoderSpec], list[Weight]]
    ignore: tuple[str, ...] = ()


def rope(c: Config, head_width: int, fraction: float = 1.0) -> Rope:
    """Rotary positions from `rope_parameters` (transformers 5) or the older loose keys.

    Args:
        c: the config.
        head_width: features of a head.
        fraction: of them that turn, where the config does not say.

    Raises:
        ValueError: for a scaling rule that is not supported.
    """
    nested = c.get("rope_parameters") or c.get("rope_scaling") or {}
    # Older files call the key "type", and plain rotation has no entry at all.
    kind = nested.get("rope_type") or nested.get("type") or "default"
    if kind not in ("default", "mrope", "linear"):
        raise ValueError(f"rope type {kind!r} is none of ['default', 'linear', 'mrope']")
    # 10000 is what transformers assumes where a file says nothing.
    theta = c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0
    fraction = c.get("partial_rotary_factor") or c.get("rotary_pct") or fraction
    return Rope(
        theta=float(nested.get("rope_theta") or theta),
        width=int(head_width * (nested.get("partial_rotary_factor") or fraction)),
        stretch=float(nested["factor"]) if kind == "linear" else 1.0,
        sections=tuple(nested.get("mrope_section") or ()),
        interleaved=bool(nested.get("mrope_interleaved", False)),
    )


def _number(c: Config, key: str, default: float) -> float:
    # In these files null means the same as a missing key.
    value = c.get(key)
    return float(default if value is None else value)


def _optional(c: Config, key: str, default: float | None = None) -> float | None:
    """Absent: the default; null: none."""
    value = c.get(key, default)
    return None if value is None else float(value)


def _refuse(c: Config, wanted: Mapping[str, Any]) -> None:
    wrong = [
        f"{key}: {c[key]!r}; only {value!r} is supported"
        for key, value in wanted.items()
        if c.get(key) is not None and c[key] != value
    ]
    if wrong:
        raise ValueError(f"{c.get('model_type', 'decoder')}:\n  " + "\n  ".join(wrong))


def _head_width(c: Config) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def _local(c: Config, window: int | None, default: Callable[[int], bool]) -> dict[str, Any]:
    """`window` and `local` of a DecoderSpec from `layer_types`."""
    layers = c["num_hidden_layers"]
    # Newer files list the layers; for older ones a rule of the family decides.
    kinds = c.get("layer_types")
    flags = [k == "sliding_attention" for k in kinds] if kinds else map(default, range(layers))
    local = tuple(flags)
    # A window without a local layer is refused by the spec.
    return {"window": window, "local": local} if window and any(local) else {}


def _rms_decoder(c: Config, block: Mapping[str, Any], **facts: Any) -> DecoderSpec:
    """What Llama and its descendants share: RMSNorm, rotary positions, gated MLP, shared keys."""
    block = {
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads"),
        "head_width": _head_width(c),
        "hidden": c["intermediate_size"],
        "activation": c.get("hidden_act", "silu"),
        "gated": True,
        "norm": "rms",
        "eps": _number(c, "rms_norm_eps", 1e-6),
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "attention_dropout": _number(c, "attention_dropout", 0.0),
        **block,
    }
    facts = {
        "vocab": c["vocab_size"],
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "rope": rope(c, _head_width(c)),
        "tied": c.get("tie_word_embeddings", False),
        "block": BlockSpec(**block),
        **facts,
    }
    return DecoderSpec(**facts)


def _llama(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", False)
    return _rms_decoder(
        c, {"qkv_bias": bias, "out_bias": bias, "mlp_bias": c.get("mlp_bias", False)}
    )


def _qwen2(c: Config) -> DecoderSpec:
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", 28)
    return _rms_decoder(c, {"qkv_bias": True}, **_local(c, window, lambda i: i >= first))


def _qwen3(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", False)
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", 28)
    # The default of Qwen3's class, whatever the width.
    head = c.get("head_dim") or 128
    block = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "rms", "head_width": head}
    return _rms_decoder(c, block, rope=rope(c, head), **_local(c, window, lambda i: i >= first))


def _gemma_facts(c: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    bias = c.get("attention_bias", False)
    block = {
        "norm": "rms_plus_one",
        # `hidden_act` of early files is not what the model uses unless it names the same.
        "activation": c.get("hidden_activation") or "gelu_pytorch_tanh",
        # The heads of Gemma need not fill the width between them.
        "head_width": c.get("head_dim", 256),
        "qkv_bias": bias,
        "out_bias": bias,
    }
    facts = {
        "rope": rope(c, c.get("head_dim", 256)),
        "tied": c.get("tie_word_embeddings", True),
        "embed_scale": math.sqrt(c["hidden_size"]),
        # The reference rounds the factor to the type of the activations.
        "round_scale": True,
    }
    return block, facts


def _gemma(c: Config) -> DecoderSpec:
    block, facts = _gemma_facts(c)
    return _rms_decoder(c, block, **facts)


def _gemma2(c: Config) -> DecoderSpec:
    block, facts = _gemma_facts(c)
    block |= {
        "post_norm": True,
        # Gemma-2's scale is a setting of its own, not the root of the head width.
        "scale": _number(c, "query_pre_attn_scalar", 256.0) ** -0.5,
        "soft_cap": _optional(c, "attn_logit_softcapping", 50.0),
    }
    local = _local(c, c.get("sliding_window", 4096), lambda i: i % 2 == 0)
    cap = _optional(c, "final_logit_softcapping", 30.0)
    return _rms_decoder(c, block, logit_cap=cap, **facts, **local)


def _gpt2(c: Config) -> DecoderSpec:
    _refuse(c, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["n_embd"],
        layers=c["n_layer"],
        positions="learned",
        max_positions=c.get("n_positions", 1024),
        tied=c.get("tie_word_embeddings", True),
        embed_dropout=(_number(c, "embd_pdrop", 0.1),),
        block=BlockSpec(
            heads=c["n_head"],
            # GPT-2's own files have null here, which means 4 widths.
            hidden=c.get("n_inner") or 4 * c["n_embd"],
            activation=c.get("activation_function", "gelu_new"),
            eps=_number(c, "layer_norm_epsilon", 1e-5),
            scale=None if c.get("scale_attn_weights", True) else 1.0,
            dropout=_number(c, "resid_pdrop", 0.1),
            attention_dropout=_number(c, "attn_pdrop", 0.1),
        ),
    )


def _gpt_neox(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", True)
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        # GPT-NeoX turns a quarter of each head where the file does not say.
        rope=rope(c, _head_width(c), 0.25),
        tied=c.get("tie_word_embeddings", False),
        embed_dropout=(_number(c, "hidden_dropout", 0.0),),
        block=BlockSpec(
            heads=c["num_attention_heads"],
            hidden=c["intermediate_size"],
            activation=c.get("hidden_act", "gelu"),
            eps=_number(c, "layer_norm_eps", 1e-5),
            qkv_bias=bias,
            out_bias=bias,
            residual="parallel" if c.get("use_parallel_residual", True) else "sequential",
            dropout=_number(c, "hidden_dropout", 0.0),
            attention_dropout=_number(c, "attention_dropout", 0.0),
        ),
    )


def _mpt(c: Config) -> DecoderSpec:
    attn = c.get("attn_config") or {}
    # The Hugging Face class fixes the MLP's width at 4 d and always uses ALiBi, whatever
    # expansion_ratio, alibi and learned_pos_emb say; attn_pdrop is its only dropout rate.
    dropout = _number(attn, "attn_pdrop", 0.0)
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["d_model"],
        layers=c["n_layers"],
        alibi=_number(attn, "alibi_bias_max", 8.0),
        tied=c.get("tie_word_embeddings", True),
        block=BlockSpec(
            heads=c["n_heads"],
            hidden=4 * c["d_model"],
            activation="gelu",
            norm="layer_no_bias",
            eps=_number(c, "layer_norm_epsilon", 1e-5),
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            scale=_optional(attn, "softmax_scale"),
            # 0 means no clipping, not clipping to 0.
            clip=_optional(attn, "clip_qkv") or None,
            dropout=dropout,
            attention_dropout=dropout,
        ),
    )


def _mosaic_gpt(c: Config) -> DecoderSpec:
    """MPT-1B and its code, older than MPT's (mosaicml/examples v0.0.4)."""
    _refuse(c, {"alibi": True, "prefix_lm": False, "logit_scale": None})
    bias = not c.get("no_bias", False)
    norm = "layer" if bias else "layer_no_bias"
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["d_model"],
        layers=c["n_layers"],
        alibi=_number(c, "alibi_bias_max", 8.0),
        embed_dropout=(_number(c, "emb_pdrop", 0.0),),
        block=BlockSpec(
            heads=c["n_heads"],
            hidden=c.get("mlp_ratio", 4) * c["d_model"],
            activation="gelu",
            norm=norm,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            qk_norm=norm if c.get("attn_qk_ln") else None,
            # The norm spans all heads, before they are split.
            qk_norm_over="all",
            scale=_optional(c, "softmax_scale"),
            # 0 means no clipping, not clipping to 0.
            clip=_optional(c, "attn_clip_qkv") or None,
            dropout=_number(c, "resid_pdrop", 0.0),
            attention_dropout=_number(c, "attn_pdrop", 0.0),
        ),
    )


def _opt(c: Config) -> DecoderSpec:
    _refuse(
        c,
        {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": c["hidden_size"],
        },
    )
    bias = c.get("enable_bias", True)
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        positions="learned",
        # OPT's positions begin at row 2 of the table, as fairseq's do.
        max_positions=c["max_position_embeddings"] + 2,
        first_position=2,
        # OPT counts positions by the attention mask.
        count_padding=False,
        tied=c.get("tie_word_embeddings", True),
        block=BlockSpec(
            heads=c["num_attention_heads"],
            hidden=c["ffn_dim"],
            activation=c.get("activation_function", "relu"),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            dropout=_number(c, "dropout", 0.1),
            attention_dropout=_number(c, "attention_dropout", 0.0),
        ),
    )


def _phi(c: Config) -> DecoderSpec:
    return DecoderSpec(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        # Phi turns half of each head where the file does not say.
        rope=rope(c, _head_width(c), 0.5),
        tied=c.get("tie_word_embeddings", False),
        head_bias=True,
        embed_dropout=(_number(c, "embd_pdrop", 0.0),),
        block=BlockSpec(
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads"),
            hidden=c["intermediate_size"],
            activation=c.get("hidden_act", "gelu_new"),
            eps=_number(c, "layer_norm_eps", 1e-5),
            qk_norm="layer" if c.get("qk_layernorm") else None,
            # One norm feeds both attention and MLP.
            residual="parallel_shared",
            dropout=_number(c, "resid_pdrop", 0.0),
            attention_dropout=_number(c, "attention_dropout", 0.0),
        ),
    )


# Older versions of transformers saved these, which follow from the config.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")

# model_type -> family
LANGUAGES = {
    "gemma": Language(_gemma, names.rms, _BUFFERS),
    "gemma2": Language(_gemma2, names.rms, _BUFFERS),
    "gpt2": Language(_gpt2, names.gpt2, _BUFFERS),
    "gpt_neox": Language(_gpt_neox, names.gpt_neox, _BUFFERS),
    "llama": Language(_llama, names.rms, _BUFFERS),
    "mosaic_gpt": Language(_mosaic_gpt, names.mosaic_gpt),
    "mpt": Language(_mpt, names.mpt),
    "opt": Language(_opt, names.opt),
    "phi": Language(_phi, names.phi, _BUFFERS),
    "qwen2": Language(_qwen2, names.rms, _BUFFERS),
    "qwen3": Language(_qwen3, names.rms, _BUFFERS),
}
