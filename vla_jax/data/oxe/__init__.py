"""The datasets that can be named in `data.datasets[].spec`. Adding one is one line here."""

import difflib

from vla_jax.data.oxe import specs
from vla_jax.data.spec import DatasetSpec

SPECS: dict[str, DatasetSpec] = {
    "bridge_dataset": specs.BRIDGE_DATASET,
    "bridge_orig": specs.BRIDGE_ORIG,
    "calvin": specs.CALVIN,
}


def get_spec(name: str) -> DatasetSpec:
    """The spec called `name`.

    Raises:
        KeyError: naming the nearest and all legal names.
    """
    if name in SPECS:
        return SPECS[name]
    near = difflib.get_close_matches(name, SPECS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise KeyError(f"no dataset spec {name!r}; {hint}legal names: {sorted(SPECS)}")
