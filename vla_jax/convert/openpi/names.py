"""The names of openpi's tensors beside ours, for its JAX parameters and its torch port.

A stacked tensor of the JAX parameters, `.../q_einsum/w`, stands here as its layers,
`.../q_einsum/w[0]`, `[1]`, ...; see `source.Unstacked`.
"""

import re
from collections.abc import Mapping
from typing import Any

from vla_jax.config import ModelConfig
from vla_jax.models import weights as w
from vla_jax.models.backbones.paligemma import PaliGemma

_IMAGE, _TEXT = "PaliGemma/img/", "PaliGemma/llm/"
_TORCH = "paligemma_with_expert.paligemma."
_TORCH_EXPERT = "paligemma_with_expert.gemma_expert."
# openpi's file keeps the token table under the name of the head that is tied to it; LeRobot's has
# both.
TORCH_TABLE, TORCH_WORDS = (
    _TORCH + name for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
)
# A head of the expert, which is not used.
TORCH_UNUSED = _TORCH_EXPERT + "lm_head.weight"
TORCH_IGNORE = (re.escape(TORCH_UNUSED) + "$",)


def jax_rows(config: ModelConfig, arch: Mapping[str, Any]) -> list[w.Weight]:
    """Every JAX parameter of pi0 or pi0.5, LoRA factors merged; of pi0-FAST without the expert.

    Args:
        config: the model.
        arch: the backbone's complete architecture.
    """
    text = arch["text_config"]
    shared = text["num_attention_heads"] == text["num_key_value_heads"]
    # big_vision calls the map to the language model's width the head of the image tower.
    rows = [*_vision(), *_flax(_IMAGE + "head", "backbone/projection")]
    rows += _stack("", "backbone/text/", "layers/", shared, adaptive=False)
    rows.append(w.Weight(_TEXT + "embedder/input_embedding", "backbone/text/embedding"))
    # pi0-FAST is the VLM alone.
    if config.structure.kind != "expert":
        return rows
    rows += _stack("_1", "expert/", "layers/block/", shared, config.expert.adaptive)
    for foreign, ours in _ports(config).items():
        rows += _flax(foreign, ours)
    return rows


def torch_rows(config: ModelConfig, arch: Mapping[str, Any]) -> list[w.Weight]:
    """Every tensor of the torch port's model.safetensors, which LeRobot's files share."""
    rows = [
        row
        for row in PaliGemma(arch).weight_map()
        # The port's lm_head holds the token table.
        if "embed_tokens" not in row.source and not row.alias
    ]
    rows = w.moved(rows, "vision_tower.", _TORCH + "model.vision_tower.")
    rows = w.moved(rows, "multi_modal_projector.", _TORCH + "model.multi_modal_projector.")
    rows = w.moved(rows, "language_model.model.", _TORCH + "model.language_model.")
    rows.append(w.Weight(TORCH_TABLE, "text/embedding"))
    rows = w.prefixed(rows, "", "backbone/")
    return [
        *rows,
        *w.prefixed(_torch_expert(config), _TORCH_EXPERT, "expert/"),
        *_torch_ports(config),
    ]


def _torch_ports(config: ModelConfig) -> list[w.Weight]:
    return [row for foreign, ours in _ports(config).items() for row in w.pair(foreign, ours)]


def _torch_expert(config: ModelConfig) -> list[w.Weight]:
    layer, target = "model.layers.{}.", "layers/block/"
    rows = w.attention(layer + "self_attn", target + "attn", "o_proj", bias=False, out_bias=False)
    for name in ("gate", "up", "down"):
        rows += w.pair(f"{layer}mlp.{name}_proj", f"{target}mlp/{name}", bias=False)
    norms = {
        layer + "input_layernorm": target + "norm1",
        layer + "post_attention_layernorm": target + "norm2",
        "model.norm": "norm",
    }
    for foreign, ours in norms.items():
        # An adaptive norm has no weight, but a linear map of the time.
        if config.expert.adaptive:
            rows += w.pair(foreign + ".dense", ours + "/modulation")
        else:
            rows += w.norm(foreign, ours, bias=False)
    return rows


def _ports(config: ModelConfig) -> dict[str, str]:
    """What stands around the expert: their name -> ours."""
    time = "time_mlp" if config.expert.adaptive else "action_time_mlp"
    ports = {
        "action_in_proj": "head/enter",
        "action_out_proj": "head/leave",
        f"{time}_in": "head/time1",
        f"{time}_out": "head/time2",
    }
    return ports | ({"state_proj": "head/state"} if config.expert.state == "expert" else {})


def _flax(foreign: str, ours: str, layer: str = "") -> list[w.Weight]:
    return [w.Weight(f"{foreign}/{x}{layer}", f"{ours}/{x}") for x in ("kernel", "bias")]


def _vision() -> list[w.Weight]:
    """SigLIP as big_vision has it."""
    block, target, layer = _IMAGE + "Transformer/encoderblock/", "backbone/vision/layers/", "[{}]"
    rows = [
        w.Weight(_IMAGE + "embedding/kernel", "backbone/vision/patch/kernel", "flax_patch"),
        w.Weight(_IMAGE + "embedding/bias", "backbone/vision/patch/bias"),
        # The positions are stored as [1, tokens, width].
        w.Weight(_IMAGE + "pos_embedding", "backbone/vision/positions", "leading_1"),
    ]
    attention = block + "MultiHeadDotProductAttention_0/"
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for foreign, ours in names.items():
        rows += _flax(attention + foreign, f"{target}attn/{ours}", layer)
    for i in (0, 1):
        rows += _flax(f"{block}MlpBlock_0/Dense_{i}", f"{target}mlp/fc{i + 1}", layer)
        rows += _norm(f"{block}LayerNorm_{i}", f"{target}norm{i + 1}", layer)
    return rows + _norm(_IMAGE + "Transformer/encoder_norm", "backbone/vision/post_norm", "")


def _norm(foreign: str, ours: str, layer: str) -> list[w.Weight]:
    return [w.Weight(f"{foreign}/{x}{layer}", f"{ours}/{x}") for x in ("scale", "bias")]


def _stack(suffix: str, tower: str, layers: str, shared: bool, adaptive: bool) -> list[w.Weight]:
    """The layers of one of Gemma's stacks and its last norm.

    Args:
        suffix: of the stack's modules, "" or "_1".
        tower: where it lies in our tree.
        layers: its layers within.
        shared: query, key and value lie in one tensor (as many key heads as heads).
        adaptive: norms are maps of the time.
    """
    source, ours, layer = _TEXT + "layers/", tower + layers, "[{}]"
    attn, mlp = source + "attn/", f"{source}mlp{suffix}/"
    if shared:
        name = f"{attn}qkv_einsum{suffix}/w{layer}"
        rows = [w.Weight(name, ours + "attn/{q,k,v}/kernel", "parts_of_heads")]
    else:
        rows = [
            w.Weight(f"{attn}q_einsum{suffix}/w{layer}", ours + "attn/q/kernel", "heads_first"),
            # Of the two parts keys come first.
            w.Weight(
                f"{attn}kv_einsum{suffix}/w{layer}", ours + "attn/{k,v}/kernel", "parts_of_heads"
            ),
        ]
    rows += [
        w.Weight(f"{attn}attn_vec_einsum{suffix}/w{layer}", ours + "attn/o/kernel"),
        # The first part is the one that GELU is applied to, the gate.
        w.Weight(f"{mlp}gating_einsum{layer}", ours + "mlp/{gate,up}/kernel", "parts"),
        w.Weight(f"{mlp}linear{layer}", ours + "mlp/down/kernel"),
    ]
    norms = {
        f"{source}pre_attention_norm{suffix}": (ours + "norm1", layer),
        f"{source}pre_ffw_norm{suffix}": (ours + "norm2", layer),
        f"{_TEXT}final_norm{suffix}": (tower + "norm", ""),
    }
    for name, (target, which) in norms.items():
        if adaptive:
            rows += _flax(name + "/Dense_0", target + "/modulation", which)
        else:
            rows.append(w.Weight(f"{name}/scale{which}", target + "/scale"))
    return rows
