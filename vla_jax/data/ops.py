"""Operations that dataset specs share: numpy, over the whole of one episode.

The gripper is 1 = open, 0 = closed everywhere after standardising.
"""

import numpy as np
from jaxtyping import Float, Float32


def binarise_gripper(position: Float[np.ndarray, "t"]) -> Float32[np.ndarray, "t"]:
    """Continuous gripper position in 0..1 -> 0 or 1: > 0.95 is open, < 0.05 is closed.

    A value in between is a movement under way and takes the next definite value; after the last
    definite one the episode's last raw value stands. Source: octo and openvla,
    `binarize_gripper_actions`.
    """
    position = np.asarray(position, np.float32)
    steps = len(position)
    definite = (position > 0.95) | (position < 0.05)
    target = np.where(definite, np.arange(steps), steps)
    target = np.minimum.accumulate(target[::-1])[::-1]
    values = np.append(position > 0.95, position[-1:]).astype(np.float32)
    return values[target]


def state_delta(state: Float[np.ndarray, "t d"]) -> Float32[np.ndarray, "t d"]:
    """state[t+1] - state[t]: what the robot did rather than what it was told; 0 at the end.

    Source: octo and openvla, `relabel_bridge_actions`.
    """
    state = np.asarray(state, np.float32)
    delta = np.zeros_like(state)
    delta[:-1] = state[1:] - state[:-1]
    return delta


def cat(*parts: np.ndarray) -> Float32[np.ndarray, "t a"]:
    """Joins [t, d] and [t] arrays along the last axis, as float32."""
    columns = [part[:, None] if part.ndim == 1 else part for part in parts]
    return np.concatenate(columns, axis=-1).astype(np.float32)
