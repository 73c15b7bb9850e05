"""Parity cases of the language models alone: the decoder against Hugging Face."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import arrays
from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.models import weights
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.rules import flatten, unflatten

# Times the largest value of the tensor.
TOLERANCE = 1e-4


def run(folder: Path) -> Iterator[Row]:
    """Everything the folder holds, at the tokens that are not padding; weights out again."""
    io, config = golden.arrays(folder), golden.config(folder)
    family = LANGUAGES[config["model_type"]]
    spec = family.spec(config)
    decoder = Decoder(spec, remat="none")
    ids = jnp.asarray(io["in/input_ids"], jnp.int32)
    mask = io.get("in/attention_mask", np.ones(ids.shape)) == 1

    rows, reference = family.weights(spec), golden.weights(folder)
    embeds = jnp.zeros((*ids.shape, spec.width))
    tree = jax.eval_shape(decoder.init, jax.random.key(0), embeds, jnp.asarray(mask))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    flat = arrays.to_ours(rows, shapes, reference, family.ignore)
    params = {"params": unflatten({path: jnp.asarray(value) for path, value in flat.items()})}
    yield _round_trip(rows, flat, reference)

    @jax.jit
    def forward(ids: Any, valid: Any) -> Any:
        def apply(decoder: Decoder) -> Any:
            result = decoder.run(decoder.embed(ids), valid, collect=True)
            return result.states, result.hidden, decoder.logits(result.hidden)

        return decoder.apply(params, method=apply)

    states, hidden, logits = forward(ids, jnp.asarray(mask))

    outputs = {f"out/hidden_{i}": state for i, state in enumerate(states)}
    outputs |= {"out/last_hidden": hidden, "out/logits": logits, "out/logits_from_embeds": logits}
    for name in sorted(k for k in io if not k.startswith("in/")):
        got = np.asarray(outputs.get(name, np.nan))
        if got.shape == io[name].shape:
            got, expected = got[mask], io[name][mask]
        else:
            expected = io[name]
        yield compare(name, got, expected, TOLERANCE * float(np.abs(expected).max()))


def _round_trip(
    rows: list[weights.Weight], flat: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> Row:
    """How many tensors do not come back bit for bit."""
    back: dict[str, np.ndarray] = {}
    for row in rows:
        back.update(arrays.to_theirs(row, flat))
    common = theirs.keys() & back.keys()
    wrong = [n for n in common if theirs[n].tobytes() != back[n].tobytes()]
    return compare(f"{len(common)} tensors exported again, differing", len(wrong), 0, 0.0)
