"""pi0.5 fine-tuned on LIBERO's four suites as openpi's `pi05_libero`: no state, H = 10.

python launch/convert.py import-openpi PI05_BASE runs/pi05_base --config=configs/pi05_libero.py \
    --tokenizer=PALIGEMMA
python launch/train.py --config=configs/pi05_libero.py:DATA --workdir=runs/pi05_libero \
    --init=runs/pi05_base

DATA, PALIGEMMA as in configs/pi0_libero.py. openpi's config reads the state neither as a token nor
in the prompt; --config.model.expert.prompt=pi05 --config.model.structure.proprio=8
--config.model.structure.text_len=200 is pi0.5 as it was pretrained.
Hardware: 3.4 B parameters, full fine-tune with an average: 67 GB before activations. Not trained
here.
"""

from typing import Any

from vla_jax.configs import pi0_libero


def get_config(data: str = "data/libero") -> Any:
    """The argument after the colon is the folder that holds the suites."""
    c = pi0_libero.get_config(data)
    c.data.update({"units": "openpi_quantile", "relative": ()})
    c.model.structure.update({"chunk": 10, "proprio": 0})
    c.model.expert.update({"adaptive": True, "state": "none", "prompt": "pi0"})
    c.optim.update({"learning_rate": 5e-5, "schedule": "constant", "warmup_steps": 10000})
    c.optim.ema_decay = 0.999
    c.train.batch_size = 256
    return c
