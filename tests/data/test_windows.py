from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_jax.data import sampler


def by_hand(length, end, window, chunk):
    """One sample, frame by frame, from the definition."""
    frames, recorded, targets, mask = [], [], [], []
    for j in range(window):
        row = end - window + 1 + j
        frames.append(max(row, 0))
        recorded.append(row >= 0)
        targets.append([min(max(row + k, 0), length - 1) for k in range(chunk)])
        mask.append([row >= 0 and row + k < length for k in range(chunk)])
    return frames, recorded, targets, mask


@pytest.mark.parametrize(
    ("length", "window", "chunk"), [(1, 1, 1), (9, 4, 3), (3, 8, 10), (6, 1, 4)]
)
def test_equal_to_the_definition(length, window, chunk):
    ends = np.arange(length)
    lengths = np.full(length, length)
    frames, observed = sampler.history(ends, window)
    targets, mask = sampler.chunks(ends, lengths, window, chunk)
    for end in range(length):
        expected = by_hand(length, end, window, chunk)
        result = (frames[end], observed[end], targets[end], mask[end])
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_calvin_worked_example():
    # Segment of frames 100..163, W = 8, F = 10: starts 100..156.
    counts = sampler.num_windows(np.array([64]), 8, left_pad=False)
    assert counts.tolist() == [57]
    assert sampler.num_windows(np.array([64, 5]), 8, left_pad=True).tolist() == [64, 5]
    assert sampler.num_windows(np.array([8, 7]), 8, left_pad=False).tolist() == [1, 0]
    starts = np.array([147, 156])
    frames, observed = sampler.history(starts - 100 + 7, 8)
    assert (frames[1] + 100).tolist() == list(range(156, 164))
    assert observed.all()
    targets, mask = sampler.chunks(starts - 100 + 7, np.array([64, 64]), 8, 10)
    assert mask[0].all()
    w, k = np.indices((8, 10))
    np.testing.assert_array_equal(mask[1], w + k < 8)
    assert mask[1][-1].sum() == 1
    assert mask[1][0].sum() == 8
    np.testing.assert_array_equal(targets[1] + 100, np.minimum(156 + w + k, 163))


def test_fork_table_without_left_padding():
    # openvla's fork, trajectory of frames 100..107, window 4, three future steps, left_pad off:
    # its mask over the seven frames of a sample, unfolded into chunks of three.
    table = [[1, 1, 1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 1, 1, 1, 0]]
    table += [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    ends = np.arange(3, 8)
    _, mask = sampler.chunks(ends, np.full(5, 8), 4, 3)
    for row, flat in zip(mask, table, strict=True):
        np.testing.assert_array_equal(row, [[flat[j + k] for k in range(3)] for j in range(4)])


def test_nothing_is_supervised_on_padding_rows():
    _, mask = sampler.chunks(np.array([0, 1]), np.array([5, 5]), 3, 4)
    assert not mask[0][:2].any()
    assert mask[0][2].all()
    assert not mask[1][0].any()
    assert mask[1][1:].sum() == 8


def test_the_collater_of_the_original():
    """The original's collated batch from its own inputs (golden outputs)."""
    folder = Path(__file__).parents[1] / "fixtures"
    golden = np.load(folder / "calvin_collater" / "io.npz")
    from vla_jax.data.oxe import get_spec
    from vla_jax.data.units.normalize import ActionSpec

    spec = ActionSpec(7, "none", 0.65, (-1.0,) * 6, (1.0,) * 6, (-1.0, 1.0))
    for i in range(2):
        length = int(golden[f"in{i}/mask"].sum())
        raw = golden[f"in{i}/actions"][:length]
        states = np.zeros((length, 15))
        episode: dict[str, Any] = {"action": raw, "robot_obs": states, "language": "x"}
        actions = spec.normalize(get_spec("calvin").standardize(episode).action)
        targets, mask = sampler.chunks(np.array([3]), np.array([length]), 4, 3)
        np.testing.assert_array_equal(mask[0], golden["disc0/chunck_mask"][i])
        result, expected = actions[targets[0]], golden["disc0/action_chunck"][i]
        np.testing.assert_allclose(result[mask[0]], expected[mask[0]], atol=1e-6)
