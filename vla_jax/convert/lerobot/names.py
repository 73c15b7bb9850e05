"""Which of SmolVLA's tensors is which of ours.

Every second layer of the expert projects the VLM's keys and values anew, so that the expert's
layers are two stacks here, `block0` and `block1`.
"""

from dataclasses import replace

from vla_jax.models import weights as w
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.structures.expert import Expert

_VLM, _EXPERT = "model.vlm_with_expert.vlm.", "model.vlm_with_expert.lm_expert."
VLM_LAYERS, EXPERT_LAYERS = _VLM + "model.text_model.layers.", _EXPERT + "layers."
# What stands around the expert: their name -> ours.
_PORTS = {
    "state_proj": "state",
    "action_in_proj": "head/enter",
    "action_out_proj": "head/leave",
    "action_time_mlp_in": "head/time1",
    "action_time_mlp_out": "head/time2",
}


def rows(model: Expert) -> list[w.Weight]:
    """Every tensor of model.safetensors.

    Args:
        model: with its complete architecture; needs no parameters.
    """
    backbone = BACKBONES[model.config.backbone.name](model.arch)
    kinds = len(model.expert_spec(model.config, backbone).crosses)
    weights = w.prefixed(backbone.weight_map(), _VLM, "backbone/")
    weights += w.prefixed(_expert(kinds), _EXPERT, "expert/")
    return weights + [row for a, b in _PORTS.items() for row in w.pair("model." + a, b)]


def _expert(kinds: int) -> list[w.Weight]:
    """The layers, `kinds` stacks of them, and the last norm."""
    weights = w.norm("norm", "norm", bias=False)
    for kind in range(kinds):
        target = "layers/block/" if kinds == 1 else f"layers/block{kind}/"
        # Kinds alternate in the file: kind k is the layers k, k + kinds and so on.
        weights += [replace(row, first=kind, step=kinds) for row in _layer(target)]
    return weights


def _layer(target: str) -> list[w.Weight]:
    layer = "layers.{}."
    rows = w.attention(layer + "self_attn", target + "attn", "o_proj", bias=False, out_bias=False)
    for name in ("gate", "up", "down"):
        rows += w.pair(f"{layer}mlp.{name}_proj", f"{target}mlp/{name}", bias=False)
    rows += w.norm(layer + "input_layernorm", target + "norm1", bias=False)
    return rows + w.norm(layer + "post_attention_layernorm", target + "norm2", bias=False)


def hidden_of(width: int) -> int:
    """Width of the expert's MLP, which LeRobot makes of the expert's own: a multiple of 256."""
    # Two thirds, since a gated MLP has three matrices where a plain one has two.
    return -(-int(4 * int(2 * width / 3)) // 256) * 256
