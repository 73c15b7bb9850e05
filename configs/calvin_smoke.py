"""A tiny Kosmos-2 with the LSTM head on demonstrations of CALVIN's simulator, from scratch.

python launch/train.py --config=configs/calvin_smoke.py:DATA --workdir=runs/calvin_smoke

DATA: RLDS made by launch/convert_data.py from what eval_servers/calvin/record.py recorded: a script
lifts blocks off the table and presses the button of the LED.
"""

from typing import Any

from configs import quickstart


def get_config(data: str = "runs/calvin_smoke/data/calvin_expert/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = quickstart.get_config(data)
    m = c.model
    # A block is 5 pixels wide in the static view at this size, and 20 in the gripper's.
    m.backbone.arch["vision_config"].update({"image_size": 64, "patch_size": 16})
    m.structure.update({"text_len": 32, "proprio": 15})
    # From 480 demonstrations; pictures move, so that they are not learnt by heart.
    c.augment.shift = {"primary": 2, "wrist": 2}
    c.train.update({"steps": 2000, "batch_size": 64})
    return c
