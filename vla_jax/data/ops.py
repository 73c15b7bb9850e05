"""Operations that dataset specs share: numpy, over the whole of one episode.

The gripper is 1 = open, 0 = closed everywhere after standardizing.

Axis letters: t steps, d features, a action dimension.
"""

import zlib

import numpy as np
from jaxtyping import Float, Float32, Integer, Shaped


def binarize_gripper(position: Float[np.ndarray, "t"]) -> Float32[np.ndarray, "t"]:
    """Continuous gripper position in 0..1 -> 0 or 1: > 0.95 is open, < 0.05 is closed.

    A value in between is a movement under way and takes the next definite value; after the last
    definite one the episode's last raw value stands. Source: octo and openvla,
    `binarize_gripper_actions`.
    """
    position = np.asarray(position, np.float32)
    steps = len(position)
    definite = (position > 0.95) | (position < 0.05)
    target = np.where(definite, np.arange(steps), steps)
    # The next definite step at or after each one; `steps` where there is none.
    target = np.minimum.accumulate(target[::-1])[::-1]
    # The element added at the end serves the steps after the last definite one.
    values = np.append(position > 0.95, position[-1:]).astype(np.float32)
    return values[target]


binarise_gripper = binarize_gripper  # as specs of version 0.1 call it, which are users' own files


def absolute_gripper(change: Float[np.ndarray, "t"]) -> Float32[np.ndarray, "t"]:
    """Commands to change (> 0.1 close, < -0.1 open, else as it is) -> 0 or 1.

    A command holds until the next. Before the first one the gripper is in the other state, as a
    command that changes nothing would not have been given; without any it is open. Source: octo
    and openvla, `rel2abs_gripper_actions`.
    """
    change = np.asarray(change, np.float32)
    is_command = np.abs(change) > np.float32(0.1)
    if not is_command.any():
        return np.ones(len(change), np.float32)
    opens = change < 0
    # The last command so far; -1 before the first.
    latest = np.maximum.accumulate(np.where(is_command, np.arange(len(change)), -1))
    before = not opens[np.argmax(is_command)]
    return np.where(latest < 0, before, opens[latest]).astype(np.float32)


def state_delta(state: Float[np.ndarray, "t d"], stride: int = 1) -> Float32[np.ndarray, "t d"]:
    """state[t+stride] - state[t]: what the robot did rather than what it was told; 0 at the end.

    Source: octo and openvla, `relabel_bridge_actions`.
    """
    state = np.asarray(state, np.float32)
    delta = np.zeros_like(state)
    delta[:-stride] = state[stride:] - state[:-stride]
    return delta


def euler_from_quaternion(quaternion: Float[np.ndarray, "t 4"]) -> Float32[np.ndarray, "t 3"]:
    """Unit quaternions (x, y, z, w) -> angles about the fixed x, y and z axes, in that order.

    The rotation is Rz Ry Rx. Where y is a quarter turn only a sum of the other two is determined,
    and z is set to 0. Source of the convention: tensorflow_graphics `euler.from_quaternion`.
    """
    # In float64, as the arcsine near a quarter turn loses half of the digits.
    x, y, z, w = np.asarray(quaternion, np.float64).T
    # Rounding can carry it past 1, where the arcsine is not a number.
    sine = np.clip(2 * (y * w - x * z), -1, 1)
    about_x = np.arctan2(2 * (x * w + y * z), 1 - 2 * (x * x + y * y))
    about_z = np.arctan2(2 * (z * w + x * y), 1 - 2 * (y * y + z * z))
    # Gimbal lock: x and z turn about the same axis.
    locked = np.abs(np.abs(sine) - 1) < 1e-6
    side = np.sign(sine)
    alone = np.arctan2(side * 2 * (x * y - z * w), side * 2 * (x * z + y * w))
    about_y = np.where(locked, side * np.pi / 2, np.arcsin(sine))
    angles = [np.where(locked, alone, about_x), about_y, np.where(locked, 0.0, about_z)]
    return np.stack(angles, axis=-1).astype(np.float32)


def into_frame(
    vector: Float[np.ndarray, "t 2"], yaw: Float[np.ndarray, "t"]
) -> Float32[np.ndarray, "t 2"]:
    """Plane vectors of the world as seen by a robot that is turned by `yaw` radians."""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    forward = cosine * vector[:, 0] + sine * vector[:, 1]
    left = cosine * vector[:, 1] - sine * vector[:, 0]
    return np.stack([forward, left], axis=-1).astype(np.float32)


def first_text(codes: Integer[np.ndarray, "t d"]) -> str:
    """Unicode code points, ended by a 0 -> the text of the first step that has one."""
    for row in codes:
        text = "".join(map(chr, row.tolist())).split("\0", 1)[0]
        if text:
            return text
    return ""


def inflate(values: Shaped[np.ndarray, "t *d"]) -> Shaped[np.ndarray, "t *e"]:
    """zlib-compressed float32 rows, as a reader hands them on that does not decode -> numbers.

    Numbers come back as they are.
    """
    # A reader that knows the encoding has inflated them already.
    if values.dtype != object:
        return values
    rows = [zlib.decompress(blob) for blob in values.ravel()]
    return np.frombuffer(b"".join(rows), np.float32).reshape(len(rows), -1)


def cat(*parts: np.ndarray) -> Float32[np.ndarray, "t a"]:
    """Joins [t, d] and [t] arrays along the last axis, as float32."""
    columns = [part[:, None] if part.ndim == 1 else part for part in parts]
    return np.concatenate(columns, axis=-1).astype(np.float32)
