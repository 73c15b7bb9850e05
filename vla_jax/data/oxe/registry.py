"""The datasets that can be named in `data.datasets[].spec`. Adding one is one line in a file."""

import difflib

from vla_jax.data.oxe import arms, franka, octo, others, rtx
from vla_jax.data.spec import DatasetSpec

# openvla's rules, which RoboVLMs shares, and octo's for what only octo has. The one exception is
# bridge_dataset, which is octo's: openvla's rule for the same data is called bridge_orig.
SPECS: dict[str, DatasetSpec] = {**rtx.SPECS, **franka.SPECS, **arms.SPECS, **others.SPECS}
VARIANTS: dict[str, dict[str, DatasetSpec]] = {
    "default": {},
    "openvla": {"bridge_dataset": others.BRIDGE_ORIG},
    "octo": octo.specs(SPECS),
}


def get_spec(name: str, variant: str = "default") -> DatasetSpec:
    """The spec called `name`.

    Args:
        name: of the dataset.
        variant: whose rules, a key of `VARIANTS`, where octo's and openvla's differ.

    Raises:
        KeyError: naming the nearest and all legal names.
    """
    if variant not in VARIANTS:
        raise KeyError(f"no variant {variant!r}; legal: {sorted(VARIANTS)}")
    # A variant lists only what differs; all else is the common spec.
    if name in VARIANTS[variant]:
        return VARIANTS[variant][name]
    if name in SPECS:
        return SPECS[name]
    near = difflib.get_close_matches(name, SPECS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise KeyError(f"no dataset spec {name!r}; {hint}legal names: {sorted(SPECS)}")
