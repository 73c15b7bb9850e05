"""Quasi-static contact between cubes on a table: pushing sideways, resting, falling.

There is no velocity anywhere: a body moves only while something moves it, and a body without
support falls within one control step. Sideways, every body is a disc.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

import numpy as np

from eval_servers.tabletop.layout import BLOCK_HALF, BLOCK_HIGH, BLOCK_LOW, BLOCK_RADIUS

# Vertical play below which two bodies count as one above the other, not beside (meters).
LEVEL = 0.002
# Discs closer than this are touching; not zero, so that pushing ends.
TOUCH = 1e-6


class Disc(NamedTuple):
    """An upright cylinder that pushes blocks: center, radius and vertical extent in meters."""

    x: float
    y: float
    radius: float
    bottom: float
    top: float


def as_disc(block: Sequence[float]) -> Disc:
    """The cube centered at `block` [3] as a `Disc`."""
    x, y, z = block
    return Disc(x, y, BLOCK_RADIUS, z - BLOCK_HALF, z + BLOCK_HALF)


def beside(disc: Disc, block: Sequence[float]) -> bool:
    """Whether `disc` overlaps the height range of the cube centered at `block` [3]."""
    return disc.bottom < block[2] + BLOCK_HALF - LEVEL and disc.top > block[2] - BLOCK_HALF + LEVEL


def overlap(disc: Disc, block: Sequence[float]) -> float:
    """Horizontal penetration of disc and block in meters; negative when they are apart."""
    return disc.radius + BLOCK_RADIUS - math.hypot(block[0] - disc.x, block[1] - disc.y)


def push(blocks: np.ndarray, free: Sequence[int], discs: list[Disc]) -> Any:
    """Move free blocks out of the way of the tool's discs and of each other.

    Args:
        blocks: float [n, 3] cube centers.
        free: indices of the cubes that may move.
        discs: what the tool occupies now.

    Returns:
        float [n, 3] the centers afterwards, or None if something is jammed against the rim.
    """
    # Plain floats: numpy's cost a call would be most of a control step.
    spots = blocks.tolist()
    # Pushing one block may push the next; a chain that does not end within 12 rounds is jammed.
    for _ in range(12):
        moved = False
        for i in free:
            other_discs = [as_disc(spots[j]) for j in free if j != i]
            for rank, disc in enumerate(discs + other_discs):
                depth = overlap(disc, spots[i])
                if depth <= TOUCH or not beside(disc, spots[i]):
                    continue
                moved = True
                # Of two blocks each takes half; the tool does not give way.
                fraction = 1.0 if rank < len(discs) else 0.5
                _away(spots[i], (disc.x, disc.y), depth * fraction + TOUCH / 2)
        if not moved:
            return np.array(spots)
    return None


def _away(spot, origin, distance):
    """Move `spot` [3] sideways away from `origin` [2], but not off the table."""
    dx, dy = spot[0] - origin[0], spot[1] - origin[1]
    norm = math.hypot(dx, dy)
    # Centers that coincide have no direction between them; any fixed one keeps it deterministic.
    dx, dy = (dx / norm, dy / norm) if norm > 0 else (0.0, -1.0)
    # Stopped at the rim, a block stays in the way, which is how `push` finds a jam.
    spot[0] = min(max(spot[0] + dx * distance, BLOCK_LOW[0]), BLOCK_HIGH[0])
    spot[1] = min(max(spot[1] + dy * distance, BLOCK_LOW[1]), BLOCK_HIGH[1])


def support(blocks: Any, i: int) -> int:
    """Index of the cube that cube `i` would land on, or -1 for the table.

    Args:
        blocks: float [n, 3] cube centers.
        i: index of the cube.
    """
    best = -1
    for j, block in enumerate(blocks):
        # Half a block lower at least, so that blocks side by side do not support each other.
        lower = j != i and block[2] < blocks[i][2] - BLOCK_HALF
        if lower and overlap(as_disc(block), blocks[i]) > TOUCH:
            best = j if best < 0 or block[2] > blocks[best][2] else best
    return best


def settle(blocks: np.ndarray, free: Sequence[int]) -> None:
    """Let every free cube fall onto what is below it, the lowest first.

    A cube whose center is beyond the edge of its support tips off it and lands beside.

    Args:
        blocks: float [n, 3] cube centers, changed in place.
        free: indices of the cubes that nothing holds.
    """
    spots = blocks.tolist()
    # From below, so that each cube falls onto supports that have come to rest.
    for i in sorted(free, key=lambda k: spots[k][2]):
        # A cube that tips off one support may land on another that it overhangs as well.
        for _ in range(len(spots)):
            j = support(spots, i)
            if j < 0:
                break
            gap = math.hypot(spots[i][0] - spots[j][0], spots[i][1] - spots[j][1])
            # Its center of mass is above the support, so it stays.
            if gap <= BLOCK_HALF:
                break
            _away(spots[i], spots[j], 2 * BLOCK_RADIUS - gap + TOUCH)
        j = support(spots, i)
        spots[i][2] = BLOCK_HALF if j < 0 else spots[j][2] + 2 * BLOCK_HALF
    blocks[:] = spots
