import numpy as np
import pytest

from vla_jax.data.sampler import MixtureOrder, SequentialOrder, feistel


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65537])
@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_feistel_is_a_permutation(size, key):
    permuted = feistel(np.arange(size), size, np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


def test_feistel_looks_random():
    size = 50_000
    permuted = feistel(np.arange(size), size, np.full(size, 3, np.uint64))
    other = feistel(np.arange(size), size, np.full(size, 4, np.uint64))
    assert abs(np.corrcoef(np.arange(size), permuted)[0, 1]) < 0.02
    assert abs(np.corrcoef(permuted[1:], permuted[:-1])[0, 1]) < 0.02
    assert (permuted == other).mean() < 1e-3
    counts = np.bincount(permuted[:5000] * 50 // size, minlength=50)  # where the first tenth goes
    assert ((counts - 100) ** 2 / 100).sum() < 90  # chi square, 49 degrees: 99.97 %


def test_every_epoch_visits_each_window_once():
    sizes = [13, 50, 7]
    order = MixtureOrder(sizes, [1.0, 2.0, 1.0], seed=1, block=64)
    dataset, window = order(np.arange(5_000))
    for d, size in enumerate(sizes):
        actual = window[dataset == d]
        epochs = actual[: len(actual) // size * size].reshape(-1, size)
        assert len(epochs) > 5
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert (epochs[0] != epochs[1]).any()


def test_one_dataset_is_visited_once_whatever_the_block():
    order = MixtureOrder([96], [1.0], seed=0, block=16384)
    _, window = order(np.arange(96 * 4))
    assert (np.sort(window.reshape(4, 96), axis=1) == np.arange(96)).all()


def test_shares_are_exact_over_every_block():
    sizes, weights = [3_700_000, 2_400_000, 70_127, 900], [0.54, 0.83, 1.0, 2.0]
    order = MixtureOrder(sizes, weights, seed=5, block=16384)
    mass = np.array(sizes) * np.array(weights)
    shares = mass / mass.sum()
    for block in (0, 7, 10**8):
        dataset, window = order(np.arange(16384) + block * 16384)
        counts = np.bincount(dataset, minlength=4)
        assert np.abs(counts - shares * 16384).max() < 2
        assert all((window[dataset == d] < size).all() for d, size in enumerate(sizes))
    dataset, _ = order(np.arange(16384 * 20))
    assert np.abs(np.bincount(dataset) - shares * 16384 * 20).max() < 2  # no drift


def test_any_sample_can_be_asked_for_alone():
    order = MixtureOrder([100, 37], [1.0, 1.0], seed=2, block=256)
    samples = np.array([0, 5, 255, 256, 10_000, 10**11 + 5])
    together = order(samples)
    for i, sample in enumerate(samples):
        alone = order(np.array([sample]))
        assert (alone[0][0], alone[1][0]) == (together[0][i], together[1][i])


def test_order_depends_on_the_seed():
    orders = [MixtureOrder([100], [1.0], seed=s, block=256)(np.arange(100))[1] for s in (0, 1)]
    assert (orders[0] != orders[1]).mean() > 0.9


def test_a_share_below_one_in_a_block_says_what_to_set():
    with pytest.raises(ValueError, match=r"set data\.block >= 1001"):
        MixtureOrder([1000, 1], [1.0, 1.0], seed=0, block=512)
    with pytest.raises(ValueError, match="needs windows"):
        MixtureOrder([10, 0], [1.0, 1.0], seed=0, block=512)


def test_sequential_order():
    order = SequentialOrder([2, 3])
    assert len(order) == 5
    dataset, window = order(np.arange(5))
    assert dataset.tolist() == [0, 0, 1, 1, 1]
    assert window.tolist() == [0, 1, 0, 1, 2]
