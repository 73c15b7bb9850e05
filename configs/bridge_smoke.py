"""A tiny Kosmos-2 with the LSTM head on a few real robot trajectories (Bridge V2): a smoke test.

python launch/train.py --config=configs/bridge_smoke.py --workdir=runs/bridge_smoke

Two CPU cores, about three minutes. Ends with the held-out trajectories' action L1 beside that of
always predicting the mean action; it must come out lower. Other data: --config=FILE:DIR, where DIR
is a version folder of `bridge_dataset` in RLDS.
"""

from pathlib import Path
from typing import Any

from vla_jax.configs import quickstart

ROOT = Path(__file__).resolve().parents[1]
# The 25 trajectories of octo's debug set where it lies beside the repository, else four of them.
FOLDERS = (ROOT.parent / "shared/data/bridge", ROOT / "tests/fixtures")


def get_config(data: str = "") -> Any:
    """The argument after the colon is the dataset's folder."""
    folders = [str(f / "bridge_dataset/1.0.0") for f in FOLDERS if f.is_dir()]
    c = quickstart.get_config(data or folders[0])
    c.model.structure.cameras = ("primary",)
    c.data.datasets[0]["spec"] = "bridge_dataset"
    # The debug set's "val" holds the same trajectories as its "train": split "train" instead.
    c.data.update({"val_split": "", "val_fraction": 0.2, "normalization": "q99"})
    # Twenty trajectories are learnt by heart in no time: few steps, and images that move.
    c.augment.shift = {"primary": 2}
    c.optim.update({"learning_rate": 5e-4, "warmup_steps": 20, "weight_decay": 0.1})
    c.train.update({"steps": 200, "batch_size": 32, "save_every": 100})
    # AdamW: on 20 trajectories Muon only overfits sooner.
    c.optim.update({"muon": (), "rates": ()})
    return c
