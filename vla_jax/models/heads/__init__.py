"""The heads: one file each, one line here."""

from vla_jax.models.heads.common import Head
from vla_jax.models.heads.detokenizer import Detokenizer
from vla_jax.models.heads.diffusion import DiffusionHead
from vla_jax.models.heads.expert_flow import ExpertFlow
from vla_jax.models.heads.fast import Fast
from vla_jax.models.heads.flow import FlowHead
from vla_jax.models.heads.gpt2 import GPT2Head
from vla_jax.models.heads.l1 import L1Head
from vla_jax.models.heads.lstm import LSTMHead
from vla_jax.models.heads.mlp import MLPHead

HEADS: dict[str, type[Head]] = {
    "mlp": MLPHead,
    "lstm": LSTMHead,
    "gpt2": GPT2Head,
    "detokenizer": Detokenizer,
    "fast": Fast,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "expert_flow": ExpertFlow,
    "l1": L1Head,
}
