import jax.numpy as jnp
import pytest

from vla_jax.train.finite import DivergedError, SkippedSteps, all_finite


def test_all_finite_looks_at_every_floating_number():
    good = {"a": jnp.ones(3), "count": jnp.array(2), "half": jnp.ones(2, jnp.bfloat16)}
    assert bool(all_finite(good))
    assert bool(all_finite({"count": jnp.array(2)}))
    for bad in (jnp.inf, jnp.nan):
        assert not bool(all_finite({**good, "half": good["half"].at[1].set(bad)}))


def test_skipped_steps_are_counted_and_a_good_one_starts_the_row_anew(caplog):
    skipped = SkippedSteps(limit=3, batch_size=4)
    for step, value in [(1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, jnp.float32(1))]:
        skipped.add(step, value, next_sample=4 * step)
    assert skipped.total == 4
    assert "step 2: the loss or its gradients are not finite; skipped (2 in a row" in caplog.text
    assert "samples 4 to 7" in caplog.text
    with pytest.raises(DivergedError, match=r"3 steps in a row, 4 to 6 \(samples 12 to 23\)"):
        skipped.add(6, 1.0, next_sample=24)
