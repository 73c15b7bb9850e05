"""OpenFlamingo-3B (MPT-1B), policy head, LSTM, W = 8, F = 10, one camera on CALVIN.

python launch/train.py --config=configs/flamingo_ph.py:DATA --workdir=runs/flamingo_ph \
    --config.model.backbone.hf_dir=FLAMINGO

DATA: as in kosmos_ph.py. FLAMINGO: the files of mosaicml/mpt-1b-redpajama-200b-dolly and, beside
them, checkpoint.pt of openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct and
open_clip_model.safetensors of timm/vit_large_patch14_clip_224.openai.
Other language models: OpenFlamingo-4B's and 9B's files in the same way; its config.json chooses.
Hardware: 2.6 B parameters, of which 1.1 B train. Not run yet at this size.
Published by the original: nothing (its README's rows of these numbers are HULC's).
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "flamingo"
    # The hub's checkpoint has as many rows of words as its tokenizer, fewer than config.json says.
    c.model.backbone.arch.text_config = {"vocab_size": 50280}
    # No action token: the largest features of the text's tokens.
    c.model.structure.update({"window": 8, "cameras": ("primary",), "readout": "text"})
    c.model.head.down_sample = "pooling"
    c.augment.shift = {"primary": 10}
    c.optim.update({"learning_rate": 1e-4, "weight_decay": 0.1, "clip_norm": 1.0})
    c.optim.warmup_steps = 0
    c.optim.frozen = ("^backbone/",)
    c.optim.trained = (
        ("^backbone/resampler/", -1),
        ("^backbone/text/embedding$", -1),
        ("^backbone/text/layers/extra/", -1),
    )
    return c
