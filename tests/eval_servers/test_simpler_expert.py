"""The scripted expert, on a hand that goes where it is told a step late."""

import numpy as np
import pytest

from eval_servers.simpler.expert import Expert


def play(start, green, yellow, lag=0.6, steps=60):
    """Fingers approach their target by `lag` a step; a cube between closed fingers comes along."""
    fingers, target = np.array(start, float), np.array(start, float)
    cubes = [np.array(green, float), np.array(yellow, float)]
    expert, held, largest = Expert(), False, 0.0
    for _ in range(steps):
        action = expert.act(np.array([fingers, *cubes], np.float32))
        assert not action[3:6].any()
        largest = max(largest, float(np.abs(action[:3]).max()))
        target = target + action[:3]
        moved = lag * (target - fingers)
        fingers = fingers + moved
        if action[6] < 0 and np.abs(fingers - cubes[0]).max() < 0.01:
            held = True
        if action[6] > 0:
            held = False
        if held:
            cubes[0] = cubes[0] + moved
    return cubes, largest, fingers


@pytest.mark.parametrize("lag", [0.4, 0.6, 1.0])
def test_it_puts_the_cube_on_the_other(lag):
    green, yellow = (0.26, 0.1, 0.015), (0.36, -0.1, 0.015)
    cubes, largest, fingers = play((0.3, 0.0, 0.15), green, yellow, lag)
    assert np.allclose(cubes[0], np.add(yellow, (0, 0, 0.035)), atol=0.008)
    assert np.allclose(cubes[1], yellow)
    assert largest <= 0.024 + 1e-6
    assert fingers[2] > cubes[0][2] + 0.05  # let go, and away
