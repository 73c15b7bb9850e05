"""A tiny Kosmos-2 with the LSTM head on demonstrations of CALVIN's simulator, from scratch.

python launch/train.py --config=configs/calvin_smoke.py:DATA --workdir=runs/calvin_smoke

DATA: RLDS made by launch/convert_data.py from what eval_servers/calvin/record.py recorded: a script
lifts blocks off the table and presses the button of the LED. Two CPU cores, less than 20 minutes.

With 480 demonstrations (record.py --episodes=500 --renderer=tiny): 28 of 40 held-out starts by
`launch/evaluate.py calvin ... -- --renderer=tiny --execute-steps=4 --max-steps=120 --episodes=40
--tasks lift_red_block_table lift_blue_block_table lift_pink_block_table turn_on_led turn_off_led`.
One action at a time it stops at the block with its fingers open, as the last frame before closing
has them. Without the arm's state (model.structure.proprio = 0) it is 15 of 40, one of them a block.
"""

from typing import Any

from vla_jax.configs import quickstart


def get_config(data: str = "runs/calvin_smoke/data/calvin_expert/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = quickstart.get_config(data)
    m = c.model
    # A block is 5 pixels wide in the static view at this size, and 20 in the gripper's.
    m.backbone.arch["vision_config"].update({"image_size": 64, "patch_size": 16})
    m.structure.update({"text_len": 32, "proprio": 15})
    # From 480 demonstrations; pictures move, so that they are not learnt by heart.
    c.augment.shift = {"primary": 2, "wrist": 2}
    c.train.update({"steps": 1500, "batch_size": 32})
    return c
