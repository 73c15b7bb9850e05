"""Ordered tables of (path regex, value): one matcher for sharding, freezing, decay and loading.

A parameter tree is a plain nested dict; its leaves are addressed by slash paths such as
`backbone/text/layers/attn/q/kernel`. The first rule whose regex is found in the path wins.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


# A stack of scanned layers: the leading dimension of its leaves counts the layers.
STACKED = re.compile(r"(^|/)layers/")


# How many of a kernel's axes are inputs, behind a stack's: `Dense`'s `contract`. Attention's output
# projections have two, heads and head width, and so have Qwen's patches, frames and pixels. What is
# no kernel has none.
INPUT_AXES = ((r"/o/kernel$", 2), (r"/tower/patch/kernel$", 2), (r"/kernel$", 1), ("", 0))


class UnmatchedPathError(ValueError):
    """Raised with every path that no rule covers."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {slash path: leaf}, in the tree's order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """Value of the first rule whose regex is found in `path`.

    Raises:
        UnmatchedPathError: if none is.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise UnmatchedPathError(f"no rule matches {path!r}; rules: {[p for p, _ in rules]}")


def match_all(rules: Sequence[tuple[str, T]], paths: Sequence[str]) -> dict[str, T]:
    """`match` for many paths.

    Raises:
        UnmatchedPathError: naming every path no rule matches, at once.
    """
    matched: dict[str, T] = {}
    missed = []
    for path in paths:
        try:
            matched[path] = match(rules, path)
        except UnmatchedPathError:
            missed.append(path)
    if missed:
        listing = "\n  ".join(missed)
        raise UnmatchedPathError(
            f"{len(missed)} of {len(paths)} paths match no rule:\n  {listing}\n"
            f"rules: {[p for p, _ in rules]}"
        )
    return matched
