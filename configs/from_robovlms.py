"""Any of RoboVLMs' own JSON configs, translated.

python launch/train.py --config=configs/from_robovlms.py:FILE.json --workdir=runs/theirs

FILE is one of the files under RoboVLMs' configs/, or a project.json that it wrote; `parent` files
are followed. Their batch size is per GPU: without `gpus` in the file, multiply with
--config.train.batch_size. Their datasets' folders must hold RLDS here: --config.data.datasets.
Keys the original never used are named in one warning; what cannot be done is refused.

python configs/from_robovlms.py --table     every key and what becomes of it
"""

import logging
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax.configs import base
from vla_jax.convert.robovlms import config as robovlms_config
from vla_jax.convert.robovlms import keys as robovlms_keys

logger = logging.getLogger(__name__)


def get_config(path: str) -> Any:
    """The argument after the colon is the JSON file."""
    original = robovlms_config.read(path)
    raw = robovlms_config.to_raw(original, base.get_config().to_dict())
    unused = robovlms_keys.notes(original)
    if unused:
        listing = "\n  ".join(unused)
        logger.warning("%s: %d keys have no effect:\n  %s", path, len(unused), listing)
    c: Any = ConfigDict(raw)
    for free in (c.model.backbone.arch, c.augment.shift):
        free.unlock()
    return c


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(__doc__)
    print(robovlms_keys.table())
