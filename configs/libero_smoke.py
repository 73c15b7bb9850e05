"""A tiny Kosmos-2 with the LSTM head on demonstrations of libero_object, from scratch.

python launch/train.py --config=configs/libero_smoke.py:DATA --workdir=runs/libero_smoke

DATA: RLDS made by launch/convert_data.py from what eval_servers/libero/record.py recorded: a script
picks groceries up and puts them into the basket. To be evaluated with the actions of a whole chunk:
`launch/evaluate.py libero --checkpoint=runs/libero_smoke --out=OUT --python=VENV/bin/python --
--suite=object --execute-steps=4`. It checks that all of this works; no score is on record yet.
"""

from typing import Any

from vla_jax.configs import quickstart


def get_config(data: str = "runs/libero_smoke/data/libero_object_no_noops/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = quickstart.get_config(data)
    c.data.datasets[0]["spec"] = "libero_object_no_noops"
    # A carton is 6 pixels wide in the view of the table at this size, and 20 in the hand's.
    c.model.backbone.arch["vision_config"].update({"image_size": 64, "patch_size": 16})
    # No state: the published datasets' spec pads it to 9 numbers, LIBERO's clients send 8.
    c.model.structure.update({"text_len": 32})
    c.augment.shift = {"primary": 2, "wrist": 2}
    c.train.update({"steps": 1500, "batch_size": 32})
    return c
