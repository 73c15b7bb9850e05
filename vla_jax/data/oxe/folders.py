"""Where the datasets of a mixture lie: ROOT/NAME/VERSION, as TFDS and Google's bucket have them."""

import logging
import re
from typing import Any

from vla_jax.config import ConfigError
from vla_jax.data.oxe.mixtures import Variant, get_mixture
from vla_jax.data.oxe.octo import UNINFORMATIVE
from vla_jax.data.places import DataPath, data_path

log = logging.getLogger(__name__)

# The same data under the name they are published with.
_PUBLISHED = {"bridge_orig": "bridge_dataset"}
# The only version that is sound.
_VERSIONS = {"bc_z": "0.1.0"}


def mixture_entries(
    mixture: str, root: str | DataPath, variant: Variant = "openvla", action: str = "eef_pos"
) -> tuple[dict[str, Any], ...]:
    """`data.datasets` of a mixture.

    Args:
        mixture: see `get_mixture`.
        root: folder of the datasets' folders.
        variant: whose mixture; set `data.parity.variant` to the same.
        action: encoding; datasets of another are left out and logged, as are those without
            instructions.

    Raises:
        ConfigError: no such mixture, or listing every dataset that is not there.
    """
    try:
        weights = get_mixture(mixture, variant, action)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from error
    if variant == "octo":
        silent = sorted(UNINFORMATIVE & set(weights))
        if silent:
            log.warning("%s: left out, as octo hides their instructions: %s", mixture, silent)
        weights = {name: weight for name, weight in weights.items() if name not in silent}
        if not weights:
            raise ConfigError(f"{mixture}: octo hides all instructions; take the variant openvla")
    folders = {name: find_folder(root, name) for name in weights}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise ConfigError(
            f"{mixture}: {len(missing)} of {len(weights)} datasets are not in {root} "
            f"(looked for NAME/VERSION/dataset_info.json): {missing}"
        )
    return tuple(
        {"spec": name, "dir": str(folders[name]), "weight": weight}
        for name, weight in weights.items()
    )


def find_folder(root: str | DataPath, name: str) -> DataPath | None:
    """The newest version's folder of a dataset (of bc_z the sound one's), None if there is none."""
    for spelled in (name, _PUBLISHED.get(name, name)):
        folder = data_path(root) / spelled
        versions = {path.parent.name: path.parent for path in folder.glob("*/dataset_info.json")}
        if not versions:
            continue
        # Versions compare as numbers: 0.10.0 is newer than 0.9.0.
        newest = max(versions, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])
        sound = _VERSIONS.get(name, newest)
        if sound not in versions:
            log.warning("%s: only version %s is sound; there is %s", name, sound, newest)
        return versions.get(sound, versions[newest])
    return None
