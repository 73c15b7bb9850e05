"""How good the actions are on held-out windows, beside a policy that ignores what it sees.

Legend: b batch · w window · f chunk · a action dimension · n datasets of the mixture
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vla_jax.config import Config
from vla_jax.train import lora
from vla_jax.train import mesh as meshes
from vla_jax.train.augment import augment
from vla_jax.train.state import TrainState
from vla_jax.train.step import Metrics, Model
from vla_jax.types import Actions, Batch

EvalStep = Callable[[TrainState, Batch], Metrics]


@dataclass(frozen=True)
class Baseline:
    """The constant policy a trained one must beat: it knows the dataset and nothing else.

    Attributes:
        arm: float32 [n, a-1], each training set's mean arm action in model units; [n, a] without
            a gripper.
        gripper: bool [n], the gripper state most of its actions have, True = open; None without
            a gripper.
        middle: float32 [n], the number in model units above which a gripper is open.
    """

    arm: Float[np.ndarray, "n d"]
    gripper: Bool[np.ndarray, "n"] | None
    middle: Float[np.ndarray, "n"]


def mean_actions(
    means: Sequence[Float[np.ndarray, "a"]], middles: Sequence[float], gripper: bool = True
) -> Baseline:
    """The baseline of a mixture.

    Args:
        means: the mean action of each training set, in model units.
        middles: of each, see `Baseline`.
        gripper: whether the last number of an action is one.
    """
    mean, middle = np.stack(means), np.array(middles, np.float32)
    if not gripper:
        return Baseline(mean.astype(np.float32), None, middle)
    return Baseline(mean[:, :-1].astype(np.float32), mean[:, -1] > middle, middle)


def make_eval_step(
    model: Model,
    config: Config,
    mesh: Mesh,
    template: TrainState,
    baseline: Baseline | None = None,
) -> EvalStep:
    """Sums over one batch, compiled, so that `means` is exact over any number of them.

    Args:
        model: see `step.make_train_step`; so are `config`, `mesh` and `template`.
        config: of the run.
        mesh: of the run.
        template: carries the state's shardings.
        baseline: adds its sums.

    Returns:
        (state, batch) -> sums over the supervised actions: "count",
        "l1" of each arm dimension in normalized units, "gripper" right answers, "loss" and its
        parts; with a baseline "baseline_l1", "baseline_gripper" and "datasets" [n, 3]: of each
        dataset the count, L1 averaged over the arm's dimensions, right gripper answers. Without a
        gripper nothing is said of one: "datasets" is [n, 2].
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        observation = augment(
            batch.observation, batch.sample, config.seed, config.augment, model.image, train=False
        )
        # A policy acts with the average where one is kept, so that is what is judged.
        variables = {"params": lora.active(state.averaged, config.lora, train=False)}
        # One noise for all batches: a change of the figures is then a change of the weights.
        args = (batch.actions, jax.random.key(config.seed), config.optim.gripper_weight)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # see `models.sharding`
            total, parts, prediction = model.apply(variables, observation, *args, method="evaluate")
        actions = model.supervised(batch.actions)
        count = actions.mask.sum(dtype=jnp.float32)
        parts = {name: x for name, x in parts.items() if name != "rows"}
        # An empty mean is 0 / 0 in some losses and must not poison the sum.
        sums = {
            k: jnp.where(count > 0, x * count, 0.0) for k, x in {**parts, "loss": total}.items()
        }
        middle: Any = 0.5
        if baseline is not None:
            middle = jnp.asarray(baseline.middle)[batch.dataset][:, None, None]
        opened = None
        if prediction.gripper is not None:
            # A number is in the units of the targets; others are logits.
            opened = prediction.gripper > (middle if config.model.gripper_is_number else 0.0)
        sums |= {"count": count, **_errors(prediction.arm, opened, actions, middle)}
        if baseline is not None:
            arm = jnp.asarray(baseline.arm, jnp.float32)[batch.dataset][:, None, None]
            is_open = None
            if baseline.gripper is not None:
                is_open = jnp.asarray(baseline.gripper)[batch.dataset][:, None, None]
            fixed = _errors(arm, is_open, actions, middle)
            sums |= {f"baseline_{name}": x for name, x in fixed.items()}
            count = len(baseline.arm)
            sums["datasets"] = _by_dataset(
                prediction.arm, opened, actions, middle, batch.dataset, count
            )
        return sums

    shardings = jax.tree.map(lambda x: x.sharding, template)
    return jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
        compiler_options=meshes.compiler_options(mesh),
    )


def _errors(
    arm: Float[Array, "..."], is_open: Bool[Array, "..."] | None, actions: Actions, middle: Any
) -> dict[str, Array]:
    distance = jnp.abs(arm.astype(jnp.float32) - actions.chunk[..., : arm.shape[-1]])
    sums = {"l1": jnp.where(actions.mask[..., None], distance, 0.0).sum((0, 1, 2))}
    if is_open is not None:
        # The last number of an action is the gripper, the larger the more open.
        right = is_open == (actions.chunk[..., -1] > middle)
        sums["gripper"] = (actions.mask & right).sum(dtype=jnp.float32)
    return sums


def _by_dataset(
    arm: Float[Array, "b w f d"],
    is_open: Bool[Array, "b w f"] | None,
    actions: Actions,
    middle: Any,
    dataset: Int[Array, "b"],
    datasets: int,
) -> Float[Array, "n k"]:
    distance = jnp.abs(arm.astype(jnp.float32) - actions.chunk[..., : arm.shape[-1]]).mean(-1)
    # Under the mask the column of ones adds up to the count of actions.
    columns = [jnp.ones_like(distance), distance]
    if is_open is not None:
        right = is_open == (actions.chunk[..., -1] > middle)
        columns.append(right.astype(jnp.float32))
    each = jnp.stack(columns, axis=-1)
    rows = jnp.where(actions.mask[..., None], each, 0.0).sum((1, 2))
    return jax.ops.segment_sum(rows, dataset, datasets)


def means(sums: Sequence[Metrics], names: Sequence[str] = ()) -> dict[str, Any]:
    """Sums of the eval step over batches -> means: floats, and lists where one per dimension.

    Adds "l1_mean" and "baseline_l1_mean" over the arm's dimensions, and for each of several
    datasets that was seen "l1_mean/NAME" and "gripper/NAME".

    Raises:
        ValueError: if no supervised action was seen.
    """
    # Sums over many batches would lose digits in float32.
    host = [{name: np.asarray(x, np.float64) for name, x in part.items()} for part in sums]
    total = {name: np.sum([part[name] for part in host], 0) for name in (host[0] if host else {})}
    count = float(total.pop("count", 0.0))
    if count == 0:
        raise ValueError("evaluation saw no supervised action: is the validation split empty?")
    datasets = total.pop("datasets", np.zeros((0, 3)))
    result: dict[str, Any] = {name: (x / count).tolist() for name, x in total.items()}
    for name in ("l1", "baseline_l1"):
        if name in result:
            result[f"{name}_mean"] = float(np.mean(result[name]))
    for name, (num_actions, *right) in zip(names, datasets, strict=False):
        if num_actions and len(names) > 1:
            # The gripper's column is missing where there is none.
            for metric, value in zip(("l1_mean", "gripper"), right, strict=False):
                result[f"{metric}/{name}"] = float(value / num_actions)
    return {**result, "count": int(count)}


def evaluate(
    step: EvalStep,
    state: TrainState,
    batches: Iterable[Batch],
    mesh: Mesh,
    names: Sequence[str] = (),
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """`means` over `batches` (this process's rows; all actions of padding rows masked).

    `stop` is asked after every batch; {} is returned as soon as it says so.
    """
    sums = []
    for local in batches:
        sums.append(step(state, meshes.shard_batch(local, mesh)))
        # A mean over fewer windows would not compare with earlier evaluations.
        if stop():
            return {}
    return means(sums, names)


def report(result: dict[str, Any], workdir: str | Path) -> str:
    """Write `WORKDIR/eval.json` and say the outcome in two lines."""
    path = Path(workdir) / "eval.json"
    # Nobody who waits for the file may read half of it.
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    ours, base = (
        f", gripper {result[key]:.3f}" if key in result else ""
        for key in ("gripper", "baseline_gripper")
    )
    return (
        f"held-out action L1 {result['l1_mean']:.4f}{ours} ({result['count']} actions)\n"
        f"mean action      L1 {result['baseline_l1_mean']:.4f}{base}"
    )
