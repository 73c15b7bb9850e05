"""Which runs may be set against each other, and how much better one is than another.

Two scores mean the same only under the same protocol. `require_same` refuses to mix runs that
differ in it and says in what; `differences` compares two policies on the episodes both have made.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from eval_servers.intervals import paired_difference
from eval_servers.row import Row

# What runs that are compared may differ in: the policy, how many episodes there are (those that
# both made are compared) and versions of libraries, which matter only if the first frames differ.
COMPARABLE = ("server", "episodes", "seeds", "simulator.versions", "simulator.first_frames")


class ProtocolError(ValueError):
    """Runs of different protocols; the message lists the keys in which they differ."""


class Difference(NamedTuple):
    """Success of a run minus that of a base run, on the episodes that both made."""

    episodes: int
    rate: float
    base_rate: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """The difference of the two rates, in [-1, 1]."""
        return self.rate - self.base_rate


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Nested dicts -> {"outer.inner": value}."""
    flat: Dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, "{}{}.".format(prefix, key)))
        else:
            flat["{}{}".format(prefix, key)] = value
    return flat


def differing(
    a: Mapping[str, Any], b: Mapping[str, Any], but: Sequence[str] = ()
) -> Dict[str, Tuple[Any, Any]]:
    """Flat key -> (value in a, value in b) wherever two protocols differ.

    Args:
        a: a protocol.
        b: another.
        but: flat keys, or what their first parts are, that may differ.
    """
    flat_a, flat_b = flatten(a), flatten(b)
    return {
        key: (flat_a.get(key), flat_b.get(key))
        for key in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(key) != flat_b.get(key)
        and not any(key == name or key.startswith(name + ".") for name in but)
    }


def require_same(
    protocols: Mapping[str, Mapping[str, Any]], purpose: str, but: Sequence[str] = ()
) -> None:
    """Raise `ProtocolError` unless all protocols agree.

    Args:
        protocols: name of a run -> its protocol.
        purpose: completes "cannot ..." in the message.
        but: see `differing`.
    """
    names = list(protocols)
    listings = []
    # Against the first alone: sameness carries over from there to all others.
    for name in names[1:]:
        fields = differing(protocols[names[0]], protocols[name], but)
        if fields:
            details = "; ".join("{} ({} / {})".format(key, *pair) for key, pair in fields.items())
            listings.append("{} and {} differ in {}".format(names[0], name, details))
    if listings:
        raise ProtocolError("cannot {}: {}".format(purpose, ". ".join(listings)))


def differences(rows: Sequence[Row], base: Sequence[Row]) -> Dict[Optional[str], Difference]:
    """Per task, and under None over all, how much more a run solves than a base run.

    Episodes count when both runs made them to the end: same index, seed and task. Of chains the
    "tasks" are how many were solved in a row.
    """
    base_rows = {row.key: row for row in base if not row.error}
    cells: Dict[Optional[str], List[int]] = {None: [0, 0, 0, 0]}
    for row in rows:
        # Pairing by episode removes the luck of the draw, which narrows the interval.
        other = base_rows.get(row.key)
        if other is None or row.error:
            continue
        base_outcomes = _outcomes(other)
        for name, solved in _outcomes(row).items():
            # both, only here, only there, neither
            place = (
                (0 if base_outcomes[name] else 1) if solved else (2 if base_outcomes[name] else 3)
            )
            cells.setdefault(name, [0, 0, 0, 0])[place] += 1
    result = {}
    for name, (both, only, base_only, neither) in cells.items():
        count = both + only + base_only + neither
        if count:
            low, high = paired_difference(both, only, base_only, neither)
            rates = (both + only) / count, (both + base_only) / count
            result[name] = Difference(count, *rates, low, high)
    return result


def _outcomes(row: Row) -> Dict[Optional[str], bool]:
    length = len(row.tasks)
    # A single task has one outcome; a chain is judged by how far it got.
    if length < 2:
        return {None: row.success, row.task: row.success}
    solved = row.solved_in_a_row
    # Defined for every k, also for chains that ended before their k-th task was begun.
    in_a_row = {"{} in a row".format(k): solved >= k for k in range(1, length + 1)}
    return {None: row.success, **in_a_row}


def other_starts(rows: Sequence[Row], base: Sequence[Row]) -> Tuple[int, int]:
    """(episodes whose first frames differ, episodes of both runs that have a first frame).

    The same episode must start with the same pixels: otherwise the renderer, the scene or the
    initial state is not what it was, whatever the protocols say.
    """
    base_frames = {row.key: row.first_frame for row in base}
    pairs = [(row.first_frame, base_frames.get(row.key)) for row in rows]
    shared = [(frame, base_frame) for frame, base_frame in pairs if frame and base_frame]
    return sum(1 for frame, base_frame in shared if frame != base_frame), len(shared)
