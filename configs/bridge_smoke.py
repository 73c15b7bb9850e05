"""A tiny Kosmos-2 with the LSTM head on a few real robot trajectories (Bridge V2): a smoke test.

python launch/train.py --config=configs/bridge_smoke.py:DIR --workdir=runs/bridge_smoke

DIR is a version folder of `bridge_dataset` in RLDS, by default the four trajectories the tests
ship. Ends by printing the held-out action L1 beside that of always predicting the mean action.
"""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config(data: str = "") -> ConfigDict:
    """The argument after the colon is the dataset's folder."""
    c = quickstart.get_config(data)
    return c
