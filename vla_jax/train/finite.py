"""What a run does about numbers that are not finite: it skips the step, counts it, and gives up.

One bad batch, or one unlucky step, must not end a run of a week; a run that diverged must not go on
for a week either. The decision is part of the compiled step, so that it costs no wait: the host
learns of a skipped step when it reads that step's metrics, a step or two later.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

T = TypeVar("T")

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """A run whose loss or gradients stay non-finite; the message says since when and on what."""


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number of a tree of arrays is finite."""
    # Integers are always finite.
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        return jnp.array(True)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def choose(condition: Bool[Array, ""], new: T, old: T) -> T:
    """The tree `new` where the condition holds, else `old`; both have the same leaves."""
    # Chosen and not multiplied by 0, which leaves NaN what it is.
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class SkippedSteps:
    """Counts the steps that were skipped, in the order of the run.

    Every process sees the same metrics, so all of them give up at the same step.

    Args:
        limit: skipped steps in a row after which the run stops.
        batch_size: samples a step, over all processes.
        write: (step, kind, values), as `RunLog.write`: gets a row of kind "skipped" for each.

    Attributes:
        total: steps skipped since this process began.
    """

    def __init__(self, limit: int, batch_size: int, write: Callable[[int, str, Any], None]):
        self._limit, self._batch_size, self._write = limit, batch_size, write
        self._in_a_row = self.total = 0

    def add(self, step: int, metrics: Mapping[str, Any], next_sample: int) -> None:
        """Take note of a finished step.

        Args:
            step: its number, counted from one.
            metrics: of the step: device scalars "loss", "grad_norm" and "skipped", not 0 if it was.
            next_sample: number of the first sample after the step's batch.

        Raises:
            DivergedError: too many in a row were skipped.
        """
        # Only a streak shows divergence; bad batches here and there do not.
        if not float(metrics["skipped"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.total += 1
        # Batches take the samples in their order, so these end right before the next one.
        first, last = next_sample - self._batch_size, next_sample - 1
        row = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        row |= {"in_a_row": self._in_a_row, "first_sample": first, "last_sample": last}
        # Ahead of giving up, so that the log has the step that ended the run as well.
        self._write(step, "skipped", row)
        logger.warning(
            "step %d: the loss or its gradients are not finite; skipped (%d in a row, %d in all), "
            "samples %d to %d",
            step, self._in_a_row, self.total, first, last,
        )  # fmt: skip
        if self._in_a_row >= self._limit:
            since = step - self._in_a_row + 1
            raise DivergedError(
                f"the loss or its gradients were not finite in {self._in_a_row} steps in a row, "
                f"{since} to {step} (samples {next_sample - self._in_a_row * self._batch_size} to "
                f"{last}); the weights are those of step {since - 1}. Lower "
                "optim.learning_rate, or look at these samples; train.max_skipped is the limit"
            )
