"""pi0-FAST fine-tuned on LIBERO's four suites as openpi's `pi0_fast_libero`: FAST tokens, H = 10.

python launch/convert.py import-openpi PI0_FAST_BASE runs/pi0fast_base \
    --config=configs/pi0fast_libero.py --tokenizer=PALIGEMMA --set model.fast.dir=FAST
python launch/train.py --config=configs/pi0fast_libero.py:DATA --workdir=runs/pi0fast_libero \
    --init=runs/pi0fast_base

DATA, PALIGEMMA as in configs/pi0_libero.py. PI0_FAST_BASE: openpi's checkpoint, with params/.
FAST: folder of the universal tokenizer (processor_config.json, tokenizer.json).
openpi gives pi0-FAST a black image for the camera that LIBERO lacks, and so does this config. Its
180 columns for prompt and answer together are 100 and 80 here. Decoding picks only tokens that
become a whole chunk; --config.model.fast.parity.vocabulary=all
--config.model.fast.parity.skipped_position=True decodes as openpi does.
Hardware: 2.9 B parameters, full fine-tune with an average: 59 GB before activations. Not trained
here.
"""

from typing import Any

from vla_jax.configs import pi0_libero


def get_config(data: str = "data/libero") -> Any:
    """The argument after the colon is the folder that holds the suites."""
    c = pi0_libero.get_config(data)
    c.data.units = "openpi_quantile"
    c.model.backbone.arch = {"mask": "prefix", "text_config": {"vocab_size": 257152}}
    c.model.structure.update({"kind": "discrete", "chunk": 10, "text_len": 100})
    c.model.head.update({"kind": "fast", "gripper": "number"})
    c.model.fast.update({"length": 80, "blank": 1})
    return c
