"""Kosmos-2 writing actions as tokens, one step, two cameras on CALVIN (as RT-2 and OpenVLA do).

python launch/train.py --config=configs/kosmos_discrete.py:DATA --workdir=runs/kosmos_discrete \
    --config.model.backbone.hf_dir=KOSMOS

DATA and KOSMOS as in configs/kosmos_ph.py.
Hardware: 1.66 B parameters, full fine-tune. Every action costs the VLM seven passes of one token
after the prompt's, so F = 1 here. With a larger window past images and actions stay in the context.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.structure.update({"kind": "discrete", "window": 1, "chunk": 1, "text_len": 40})
    c.model.head.kind = "detokenizer"
    return c
