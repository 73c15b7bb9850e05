"""Quasi-static contact between cubes on a table: pushing sideways, resting, falling.

There is no velocity anywhere: a body moves only while something moves it, and a body without
support falls within one control step. Sideways, every body is a disc.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eval_servers.tabletop.layout import BLOCK_HALF, BLOCK_HIGH, BLOCK_LOW, BLOCK_RADIUS

# Vertical play below which two bodies count as one above the other, not beside (metres).
LEVEL = 0.002
# Discs closer than this are touching; not zero, so that pushing ends.
TOUCH = 1e-6


class Disc(NamedTuple):
    """An upright cylinder that pushes blocks: centre, radius and vertical extent in metres."""

    x: float
    y: float
    radius: float
    bottom: float
    top: float


def beside(disc, block):
    """Whether `disc` overlaps the height range of the cube centred at `block` [3]."""
    return disc.bottom < block[2] + BLOCK_HALF - LEVEL and disc.top > block[2] - BLOCK_HALF + LEVEL


def overlap(disc, block):
    """Horizontal penetration of disc and block in metres; negative when they are apart."""
    gap = np.hypot(block[0] - disc.x, block[1] - disc.y)
    return disc.radius + BLOCK_RADIUS - gap


def push(blocks, free, discs):
    """Move free blocks out of the way of the tool's discs and of each other.

    Args:
        blocks: float [n, 3] cube centres.
        free: indices of the cubes that may move.
        discs: what the tool occupies now, `Disc`s.

    Returns:
        float [n, 3] the centres afterwards, or None if something is jammed against the rim.
    """
    blocks = blocks.copy()
    for _ in range(12):
        settled = True
        for i in free:
            others = [as_disc(blocks[j]) for j in free if j != i]
            for rank, disc in enumerate(discs + others):
                depth = overlap(disc, blocks[i])
                if depth <= TOUCH or not beside(disc, blocks[i]):
                    continue
                settled = False
                away = blocks[i, :2] - (disc.x, disc.y)
                norm = np.hypot(*away)
                away = away / norm if norm > 0 else np.array([0.0, -1.0])
                # Of two blocks each takes half; the tool does not give way.
                share = 1.0 if rank < len(discs) else 0.5
                blocks[i, :2] += away * (depth * share + TOUCH / 2)
            blocks[i, :2] = np.clip(blocks[i, :2], BLOCK_LOW, BLOCK_HIGH)
        if settled:
            return blocks
    return None


def as_disc(block):
    """The cube centred at `block` [3] as a `Disc`."""
    return Disc(block[0], block[1], BLOCK_RADIUS, block[2] - BLOCK_HALF, block[2] + BLOCK_HALF)


def support(blocks, i):
    """Index of the cube that cube `i` would land on, or -1 for the table."""
    below = [
        j
        for j in range(len(blocks))
        if j != i
        and blocks[j, 2] < blocks[i, 2] - BLOCK_HALF
        and overlap(as_disc(blocks[j]), blocks[i]) > TOUCH
    ]
    return max(below, key=lambda j: blocks[j, 2]) if below else -1


def settle(blocks, free):
    """Let every free cube fall onto what is below it, the lowest first.

    A cube whose centre is beyond the edge of its support tips off it and lands beside.

    Args:
        blocks: float [n, 3] cube centres, changed in place.
        free: indices of the cubes that nothing holds.
    """
    for i in sorted(free, key=lambda k: blocks[k, 2]):
        for _ in range(len(blocks)):
            j = support(blocks, i)
            away = blocks[i, :2] - blocks[j, :2]
            norm = np.hypot(*away)
            if j < 0 or norm <= BLOCK_HALF:
                break
            beside_it = blocks[j, :2] + away / norm * (2 * BLOCK_RADIUS + TOUCH)
            blocks[i, :2] = np.clip(beside_it, BLOCK_LOW, BLOCK_HIGH)
        j = support(blocks, i)
        blocks[i, 2] = BLOCK_HALF if j < 0 else blocks[j, 2] + 2 * BLOCK_HALF
