"""Which of OpenVLA's and OpenVLA-OFT's tensors is which of ours.

The VLM has the names of its Hugging Face folder; what OFT keeps in files of their own stands below
`action_head/` and `proprio_projector/` here.
"""

from typing import Any

from vla_jax.config import ModelConfig
from vla_jax.models import weights as w
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS

HEAD, STATE, VISION = "action_head", "proprio_projector", "vision_backbone"


def rows(config: ModelConfig) -> tuple[list[w.Weight], tuple[str, ...]]:
    """The rows of a whole policy, and regexes of names to pass over.

    Args:
        config: the model, `backbone.arch` complete.
    """
    kind = BACKBONES[config.backbone.name]
    backbone = kind(kind.arch(config.backbone.arch))
    weights = w.prefixed(backbone.weight_map(), "", "backbone/")
    if config.structure.proprio:
        for name in ("fc1", "fc2"):
            weights += w.pair(f"{STATE}/{name}", f"state/{name}")
    head: Any = config.head
    if HEADS[head.kind].reads == "places":
        weights += w.prefixed(_head(head.layers), f"{HEAD}/model.", "head/")
    return weights, backbone.IGNORE


def _head(layers: int) -> list[w.Weight]:
    """The residual perceptron of the L1 head."""
    weights = [*w.norm("layer_norm1", "norm_in"), *w.pair("fc1", "fc_in")]
    for i in range(layers):
        # Each block is a Sequential: norm, linear layer, ReLU.
        block = f"mlp_resnet_blocks.{i}.ffn."
        weights += [*w.norm(f"{block}0", f"norm{i}"), *w.pair(f"{block}1", f"fc{i}")]
    return [*weights, *w.norm("layer_norm2", "norm_out"), *w.pair("fc2", "fc_out")]
