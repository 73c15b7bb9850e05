"""Which parameters train and which do not, down to single layers of a stack.

A leaf of a scanned stack is [layers, ...]. When only its last k layers train it is cut in two:
`trainable` holds the last k and `frozen` the others, under the same path, and `merge` joins them
again for the model. What is frozen gets no float32 copy, no gradient buffer of its own to keep, no
moments.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax import rules
from vla_jax.config import ConfigError, OptimConfig

# Path regex -> how many of a leaf's last layers train; of other leaves only ALL and NONE.
Rules = Sequence[tuple[str, int]]
ALL, NONE = -1, 0


class Split(NamedTuple):
    """Flat dicts of one model's parameters: trainable float32, frozen bfloat16."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]


def train_rules(config: OptimConfig) -> list[tuple[str, int]]:
    """The table of a config: exceptions first, then what is frozen; all else trains."""
    return [*config.trained, *((pattern, NONE) for pattern in config.frozen)]


def split(params: Mapping[str, Any], table: Rules) -> Split:
    """Nested parameters -> what trains and what does not, each in its dtype.

    Args:
        params: nested dict of arrays or shape structs.
        table: first match wins; a path without one trains.

    Raises:
        ConfigError: naming every regex that matches nothing, every count that does not fit its
            stack, or if nothing is left to train.
    """
    flat = rules.flatten(params)
    # The last rule matches every path: what nobody names trains.
    counts = rules.match_all([*table, ("", ALL)], list(flat))
    problems = [
        f"optim: {pattern!r} matches none of {len(flat)} parameters"
        for pattern, _ in table
        if not any(rules.match([(pattern, True), ("", False)], path) for path in flat)
    ]
    starts = {}  # path -> first layer that trains
    for path, leaf in flat.items():
        count, layers = counts[path], leaf.shape[0] if leaf.shape else 0
        starts[path] = layers - count if count > 0 else 0
        if count > 0 and not rules.STACKED.search(path):
            problems.append(f"optim.trained: {path} is no stack of layers, it trains whole (-1)")
        elif count > layers or count < ALL:
            problems.append(f"optim.trained: {path} has {layers} layers, not {count} to train")
    # Every count is 0 = NONE.
    if not any(counts.values()):
        problems.append("optim.frozen: leaves no parameter to train")
    if problems:
        raise ConfigError("\n".join(problems))
    return Split(
        {
            path: _part(x, slice(starts[path], None), jnp.float32)
            for path, x in flat.items()
            if counts[path] != NONE
        },
        {
            path: _part(x, slice(starts[path] or None), jnp.bfloat16)
            for path, x in flat.items()
            if counts[path] == NONE or starts[path] > 0
        },
    )


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`, up to dtype; a leaf that was cut is float32."""
    joined = {
        path: _join(frozen[path], x) if path in frozen else x for path, x in trainable.items()
    }
    return rules.unflatten({**frozen, **joined})


def split_like(flat: Mapping[str, Any], layout: Split) -> Split:
    """Flat whole parameters -> parts with the paths, shapes and dtypes of `layout`."""

    def start(path: str) -> int:
        return layout.frozen[path].shape[0] if path in layout.frozen else 0

    return Split(
        {
            path: _part(flat[path], slice(start(path), None), x.dtype)
            for path, x in layout.trainable.items()
        },
        {
            path: _part(
                flat[path], slice(x.shape[0] if path in layout.trainable else None), x.dtype
            )
            for path, x in layout.frozen.items()
        },
    )


def _part(leaf: Any, rows: slice, dtype: Any) -> Any:
    # Integers are no weights and keep their type.
    dtype = dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    # A slice copies even where it takes everything.
    takes_all = rows.start in (None, 0) and rows.stop is None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        count = leaf.shape[:1] if takes_all else (len(range(*rows.indices(leaf.shape[0]))),)
        return jax.ShapeDtypeStruct((*count, *leaf.shape[1:]), dtype, sharding=leaf.sharding)
    return (leaf if takes_all else leaf[rows]).astype(dtype)


def _join(first: Any, last: Any) -> Any:
    # The wider of the two types, in which the part that trains loses nothing.
    dtype = jnp.promote_types(first.dtype, last.dtype)
    if isinstance(last, jax.ShapeDtypeStruct):
        shape = (first.shape[0] + last.shape[0], *last.shape[1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=last.sharding)
    return jnp.concatenate([first.astype(dtype), last.astype(dtype)])
