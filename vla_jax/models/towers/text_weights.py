"""Names of the tensors of Hugging Face's language models, family by family.

Sources are those of the `...ForCausalLM`, targets are relative to a `decoder.Decoder`.
"""

from vla_jax.models import weights as w
from vla_jax.models.towers.decoder_spec import DecoderSpec


def _head(spec: DecoderSpec, table: str, head: str = "lm_head") -> list[w.Weight]:
    """Token table and output matrix."""
    rows = [w.Weight(table + ".weight", "embedding")]
    if spec.tied:
        # Checkpoints may store a tied matrix twice; both copies must agree.
        rows.append(w.Weight(head + ".weight", "embedding", alias=True))
    else:
        rows.append(w.Weight(head + ".weight", "unembedding"))
    if spec.head_bias:
        rows.append(w.Weight(head + ".bias", "head_bias"))
    return rows


def rms(spec: DecoderSpec) -> list[w.Weight]:
    """Llama, Gemma, Gemma-2, Qwen2, Qwen3."""
    block, layer = spec.block, "model.layers.{}."
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    if block.post_norm:
        # Where there are norms behind (Gemma-2), the same name means the norm after the attention.
        norms["post_attention_layernorm"] = "post1"
        norms |= {"pre_feedforward_layernorm": "norm2", "post_feedforward_layernorm": "post2"}
    if block.qk_norm:
        norms |= {"self_attn.q_norm": "attn/q_norm", "self_attn.k_norm": "attn/k_norm"}
    rows = [*_head(spec, "model.embed_tokens"), *w.norm("model.norm", "norm", bias=False)]
    rows += w.attention(
        layer + "self_attn", "layers/attn", "o_proj", block.qkv_bias, block.out_bias
    )
    for name in ("gate", "up", "down"):
        rows += w.pair(f"{layer}mlp.{name}_proj", f"layers/mlp/{name}", bias=block.mlp_bias)
    for name, path in norms.items():
        rows += w.norm(layer + name, f"layers/{path}", bias=False)
    return rows


def gpt2(spec: DecoderSpec) -> list[w.Weight]:
    """GPT-2: Conv1D matrices, q, k and v in one."""
    layer = "transformer.h.{}."
    return [
        *_head(spec, "transformer.wte"),
        w.Weight("transformer.wpe.weight", "positions"),
        *w.norm("transformer.ln_f", "norm"),
        *w.norm(layer + "ln_1", "layers/norm1"),
        *w.norm(layer + "ln_2", "layers/norm2"),
        # A Conv1D stores [in, out], the transpose of a Linear.
        *w.pair(layer + "attn.c_attn", "layers/attn/{q,k,v}", "conv1d"),
        *w.pair(layer + "attn.c_proj", "layers/attn/o", "conv1d_from_heads"),
        *w.pair(layer + "mlp.c_fc", "layers/mlp/fc1", "conv1d"),
        *w.pair(layer + "mlp.c_proj", "layers/mlp/fc2", "conv1d"),
    ]


def gpt_neox(spec: DecoderSpec) -> list[w.Weight]:
    """GPT-NeoX: q, k and v alternate head by head."""
    layer, block = "gpt_neox.layers.{}.", spec.block
    qkv = w.pair(
        layer + "attention.query_key_value",
        "layers/attn/{q,k,v}",
        "interleaved_linear",
        block.qkv_bias,
    )
    return [
        # The output matrix is called embed_out up to transformers 5.
        *_head(spec, "gpt_neox.embed_in", "embed_out"),
        *w.norm("gpt_neox.final_layer_norm", "norm"),
        *w.norm(layer + "input_layernorm", "layers/norm1"),
        *w.norm(layer + "post_attention_layernorm", "layers/norm2"),
        *qkv,
        *w.pair(layer + "attention.dense", "layers/attn/o", "linear_from_heads", block.out_bias),
        *w.pair(layer + "mlp.dense_h_to_4h", "layers/mlp/fc1"),
        *w.pair(layer + "mlp.dense_4h_to_h", "layers/mlp/fc2"),
    ]


def mpt(spec: DecoderSpec) -> list[w.Weight]:
    """MPT: q, k and v in one."""
    layer = "transformer.blocks.{}."
    return [
        *_head(spec, "transformer.wte"),
        *w.norm("transformer.norm_f", "norm", bias=False),
        # The released models have no bias anywhere, not even in a norm.
        *w.norm(layer + "norm_1", "layers/norm1", bias=False),
        *w.norm(layer + "norm_2", "layers/norm2", bias=False),
        *w.pair(layer + "attn.Wqkv", "layers/attn/{q,k,v}", bias=False),
        *w.pair(layer + "attn.out_proj", "layers/attn/o", "linear_from_heads", False),
        *w.pair(layer + "ffn.up_proj", "layers/mlp/fc1", bias=False),
        *w.pair(layer + "ffn.down_proj", "layers/mlp/fc2", bias=False),
    ]


def mosaic_gpt(spec: DecoderSpec) -> list[w.Weight]:
    """MPT-1B: q, k and v in one; the token table is the output matrix, under one name."""
    layer, bias = "transformer.blocks.{}.", spec.block.mlp_bias
    rows = [
        w.Weight("transformer.wte.weight", "embedding"),
        *w.norm("transformer.ln_f", "norm", bias),
        *w.norm(layer + "ln_1", "layers/norm1", bias),
        *w.norm(layer + "ln_2", "layers/norm2", bias),
        *w.pair(layer + "attn.Wqkv", "layers/attn/{q,k,v}", bias=bias),
        *w.pair(layer + "attn.out_proj", "layers/attn/o", "linear_from_heads", bias),
        *w.pair(layer + "mlp.mlp_up", "layers/mlp/fc1", bias=bias),
        *w.pair(layer + "mlp.mlp_down", "layers/mlp/fc2", bias=bias),
    ]
    if spec.block.qk_norm:
        for letter in "qk":
            rows += w.norm(f"{layer}attn.{letter}_ln", f"layers/attn/{letter}_norm", bias)
    return rows


def opt(spec: DecoderSpec) -> list[w.Weight]:
    """OPT."""
    top, bias = "model.decoder.", spec.block.mlp_bias
    layer = top + "layers.{}."
    return [
        *_head(spec, top + "embed_tokens"),
        # The first token reads row 2 of this table, see `first_position`; the rows before stay, for
        # a checkpoint to go out as it came in.
        w.Weight(top + "embed_positions.weight", "positions"),
        *w.norm(top + "final_layer_norm", "norm"),
        *w.norm(layer + "self_attn_layer_norm", "layers/norm1"),
        # In each layer of OPT "final" names the norm before the MLP.
        *w.norm(layer + "final_layer_norm", "layers/norm2"),
        *w.attention(layer + "self_attn", "layers/attn", bias=bias, out_bias=bias),
        *w.pair(layer + "fc1", "layers/mlp/fc1", bias=bias),
        *w.pair(layer + "fc2", "layers/mlp/fc2", bias=bias),
    ]


def phi(spec: DecoderSpec) -> list[w.Weight]:
    """Phi."""
    layer = "model.layers.{}."
    rows = [
        *_head(spec, "model.embed_tokens"),
        *w.norm("model.final_layernorm", "norm"),
        *w.norm(layer + "input_layernorm", "layers/norm1"),
        *w.attention(layer + "self_attn", "layers/attn", "dense"),
        *w.pair(layer + "mlp.fc1", "layers/mlp/fc1"),
        *w.pair(layer + "mlp.fc2", "layers/mlp/fc2"),
    ]
    if spec.block.qk_norm:
        for letter in "qk":
            name = f"{layer}self_attn.{letter}_layernorm"
            rows += w.norm(name, f"layers/attn/{letter}_norm")
    return rows
