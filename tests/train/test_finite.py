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
    rows = []
    skipped = SkippedSteps(limit=3, batch_size=4, write=lambda *row: rows.append(row))

    def add(step: int, value: float) -> None:
        metrics = {"loss": jnp.float32(jnp.nan), "grad_norm": jnp.float32(2), "other": None}
        skipped.add(step, {**metrics, "skipped": jnp.float32(value)}, next_sample=4 * step)

    for step, value in [(1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 1.0)]:
        add(step, value)
    assert skipped.total == 4
    assert [(row[0], row[1], row[2]["in_a_row"]) for row in rows] == [
        (1, "skipped", 1), (2, "skipped", 2), (4, "skipped", 1), (5, "skipped", 2),
    ]  # fmt: skip
    assert (rows[1][2]["first_sample"], rows[1][2]["last_sample"]) == (4, 7)
    assert "step 2: the loss or its gradients are not finite; skipped (2 in a row" in caplog.text
    assert "samples 4 to 7" in caplog.text
    with pytest.raises(DivergedError, match=r"3 steps in a row, 4 to 6 \(samples 12 to 23\)"):
        add(6, 1.0)
