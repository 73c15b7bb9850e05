"""The model's control step for several sessions at once: static shapes, compiled ahead of time.

Sessions are stacked, padded to the next bucket and mapped over with `jax.vmap`: every row sees its
own history and its own noise, so a session's actions do not depend on who shares its batch.

Legend: s rows of a bucket · h, x image height and width · t text columns · p robot state
f chunk · a action dimension
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, use_abstract_mesh
from jaxtyping import Array, Bool, Float, Int32, UInt8

from vla_jax.inference.realtime import RealTime
from vla_jax.models import layers_apart
from vla_jax.models.image import ImageSpec, fit, normalize
from vla_jax.models.structures.history import History
from vla_jax.types import Guide, Observation

# Sizes of cameras whose resizing is kept compiled; clients choose them, so there is a bound.
MAX_SIZES = 64
# camera -> height and width of the model's image
Shapes = tuple[tuple[str, tuple[int, int]], ...]


def buckets(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `largest`: batch sizes that get a program of their own.

    Raises:
        ValueError: `largest` is not positive.
    """
    if largest < 1:
        raise ValueError(f"max_batch: must be at least 1, {largest} is not")
    return (*itertools.takewhile(lambda n: n < largest, (2**i for i in range(32))), largest)


@dataclass(frozen=True)
class StepInput:
    """One session's step.

    Attributes:
        images: camera -> uint8 [h, x, 3], any size.
        text: int32 [t] token ids.
        text_mask: bool [t], True on real tokens.
        proprio: float32 [p], model units, or None.
        history: of one session, on the device.
        step: how many steps came before; seeds the noise.
        previous: float32 [f, a] what is left of the last chunk, as `run` gave it, or None.
        weights: float32 [f] how strongly the new one is held to it, or None.
    """

    images: Mapping[str, UInt8[np.ndarray, "h x 3"]]
    text: Int32[np.ndarray, "t"]
    text_mask: Bool[np.ndarray, "t"]
    proprio: Float[np.ndarray, "p"] | None
    history: History
    step: int
    previous: Float[np.ndarray, "f a"] | None = None
    weights: Float[np.ndarray, "f"] | None = None


class BatchedStep:
    """A `VLA`'s `step` with its parameters, for 1 to `buckets[-1]` sessions.

    Attributes:
        action_dim: numbers of an action that `run` gives.
        buckets: batch sizes, rising.
        empty: history before the first step of an episode.
    """

    def __init__(
        self,
        model: Any,
        params: Mapping[str, Any],
        image: ImageSpec,
        seed: int,
        max_batch: int,
        realtime: RealTime | None = None,
    ):
        """Puts the parameters on the first device; compiles nothing yet.

        `realtime` says how a chunk is held to the one before, of inputs that bring that.

        Raises:
            ValueError: `max_batch` is not positive.
        """
        self.buckets, self.action_dim = buckets(max_batch), model.config.action_dim
        self._model, self._image, self._seed = model, image, seed
        # One explicit device: programs compiled ahead of time take arrays of the placement they
        # were compiled for, and histories go in as they came out.
        self._device = jax.local_devices()[0]
        self._mesh = layers_apart.serving_mesh(self._device)
        params = dict(params) if self._mesh is None else layers_apart.apart(dict(params))
        self._params = jax.device_put(params, self._device)
        # In one program: as many as it has arrays take a tenth of a second to compile.
        empty = jax.jit(model.empty_history, static_argnums=0)(1)
        self.empty: History = jax.device_put(empty, self._device)
        self._fit: Any = jax.jit(partial(fit, spec=image))
        self._stack: Any = jax.jit(lambda *images: jnp.stack(images))
        self._sizes: set[tuple[int, ...]] = set()
        self._programs: dict[tuple[int, Shapes], Any] = {}
        one = one_session(model, image, seed, self._mesh, realtime)
        self._batch: Any = partial(self.program, one)

    def warmup(self, example: StepInput) -> None:
        """Compile every bucket for images of the example's size, and run each once.

        Other sizes add one small resize, a program for each size, when they are first seen.
        """
        for bucket in self.buckets:
            self.run([example] * bucket)

    def run(self, inputs: Sequence[StepInput]) -> list[tuple[Float[np.ndarray, "f a"], History]]:
        """One step of every session, each equal to what it would be alone.

        Returns:
            For each input the predicted chunk (arm normalized; a gripper 1 = open, 0 = closed, or
            where the model's is a number that number) and the history after the step.
        """
        results: dict[int, tuple[np.ndarray, History]] = {}
        for shapes, members in self._parts(inputs):
            part = [inputs[i] for i in members]
            results.update(zip(members, self._run_part(part, shapes), strict=True))
        return [results[i] for i in range(len(inputs))]

    def _parts(self, inputs: Sequence[StepInput]) -> Iterator[tuple[Shapes, list[int]]]:
        """Rows that fit one program; some towers take large images in another size."""
        groups: dict[Shapes, list[int]] = {}
        for i, step_input in enumerate(inputs):
            shapes = {c: self._image.shape_for(*x.shape[:2]) for c, x in step_input.images.items()}
            groups.setdefault(tuple(sorted(shapes.items())), []).append(i)
        for shapes, members in groups.items():
            for start in range(0, len(members), self.buckets[-1]):
                yield shapes, members[start : start + self.buckets[-1]]

    def _run_part(
        self, inputs: Sequence[StepInput], shapes: Shapes
    ) -> list[tuple[np.ndarray, History]]:
        bucket = next(size for size in self.buckets if size >= len(inputs))
        # Padding repeats the first row: its numbers are ordinary, and nobody reads them.
        rows = [*inputs, *itertools.repeat(inputs[0], bucket - len(inputs))]
        images = {
            camera: self._stacked([self._fitted(row.images[camera]) for row in rows])
            for camera, _ in shapes
        }
        has_state, guided = rows[0].proprio is not None, rows[0].previous is not None
        arguments = (
            self._params,
            images,
            np.stack([row.text for row in rows]),
            np.stack([row.text_mask for row in rows]),
            np.stack([np.asarray(row.proprio) for row in rows]) if has_state else None,
            tuple(row.history for row in rows),
            # A fixed type, because programs compiled ahead of time take no other.
            np.array([row.step for row in rows], np.uint32),
            np.stack([np.asarray(row.previous) for row in rows]) if guided else None,
            np.stack([np.asarray(row.weights) for row in rows]) if guided else None,
        )
        program = self._programs.get((bucket, shapes))
        if program is None:
            options = layers_apart.compiler_options(self._mesh)
            program = jax.jit(self._batch).lower(*arguments).compile(compiler_options=options)
            self._programs[bucket, shapes] = program
        chunks, histories = program(*arguments)
        return list(zip(np.asarray(chunks), histories, strict=True))[: len(inputs)]

    def _fitted(self, image: UInt8[np.ndarray, "h x 3"]) -> Any:
        """The image in the model's size; one that needs no change is returned as it is."""
        if self._image.keeps(*image.shape[:2]):
            return image
        if image.shape not in self._sizes and len(self._sizes) >= MAX_SIZES:
            self._fit.clear_cache()
            self._sizes.clear()
        self._sizes.add(image.shape)
        return self._fit(image)

    def _stacked(self, images: Sequence[Any]) -> Any:
        """One array of all rows: it goes to the device as one, which many would not."""
        if all(isinstance(image, np.ndarray) for image in images):
            return np.stack(images)
        # Those that were resized lie on the device already, and stay there.
        return self._stack(*images)

    @staticmethod
    def program(
        one: Callable[..., Any],
        params: Mapping[str, Any],
        images: Mapping[str, UInt8[Array, "s _ _ 3"]],
        text: Int32[Array, "s t"],
        mask: Bool[Array, "s t"],
        proprio: Float[Array, "s p"] | None,
        histories: tuple[History, ...],
        steps: Array,
        previous: Float[Array, "s f a"] | None = None,
        weights: Float[Array, "s f"] | None = None,
    ) -> tuple[Float[Array, "s f a"], tuple[History, ...]]:
        """What a bucket compiles of `one_session`; it needs no parameters on a device to be traced.

        Stacking histories and unstacking them are part of the program: one dispatch a batch, not
        one a row.
        """
        if len(histories) == 1:
            # Not mapped over: under a map the branches of `lax.cond` are both taken.
            rows = (images, text, mask, proprio, steps, previous, weights)
            pixels, words, real, state, step, last, held = jax.tree.map(lambda x: x[0], rows)
            chunk, history = one(params, pixels, words, real, state, histories[0], step, last, held)
            return chunk[None], (history,)
        history = jax.tree.map(lambda *x: jnp.stack(x), *histories)
        chunks, history = jax.vmap(one, in_axes=(None, *[0] * 8))(
            params, images, text, mask, proprio, history, steps, previous, weights
        )
        return chunks, tuple(
            jax.tree.map(lambda x, i=i: x[i], history) for i in range(len(histories))
        )


def one_session(
    model: Any,
    image: ImageSpec,
    seed: int,
    mesh: AbstractMesh | None,
    realtime: RealTime | None = None,
) -> Callable[..., Any]:
    """A session's control step, for `BatchedStep.program`.

    Tracing a model takes as long as reading its compiled program, so all buckets have one trace:
    a compiled function keeps it. Inlined, it leaves no call in their programs.

    Args:
        model: whose `step` it is.
        image: what the image tower takes.
        seed: of the noise.
        mesh: of `layers_apart.serving_mesh`; with one, `params` has its layers apart.
        realtime: how a chunk is held to the one before.
    """
    # An arm's numbers and a gripper's command, as the head that denoises has them.
    opens = model.config.has_gripper and not model.gripper_is_number

    @partial(jax.jit, inline=True)
    def one(
        params: Mapping[str, Any],
        pixels: Mapping[str, UInt8[Array, "_ _ 3"]],
        text: Int32[Array, "t"],
        mask: Bool[Array, "t"],
        proprio: Float[Array, "p"] | None,
        history: History,
        step: Array,
        previous: Float[Array, "f a"] | None,
        weights: Float[Array, "f"] | None,
    ) -> tuple[Float[Array, "f a"], History]:
        if mesh is not None:
            params = layers_apart.together(params)
        images = {
            # A batch and a window of one, as the model's step takes them.
            camera: normalize(x.astype(jnp.float32) / 255.0, image)[None, None]
            for camera, x in pixels.items()
        }
        # All cameras are there: `Policy.check` refuses an observation without one.
        present = {camera: jnp.ones((1, 1), bool) for camera in images}
        state = None if proprio is None else proprio[None, None]
        guide = None
        if previous is not None and weights is not None and realtime is not None:
            if opens:
                previous = previous.at[:, -1].set(2.0 * previous[:, -1] - 1.0)
            guide = Guide(previous[None], weights[None], realtime.limit, realtime.jacobian)
        observation = Observation(
            images, present, text[None], mask[None], state, sentence=None, guide=guide
        )
        # The noise depends on seed and step alone, so an episode can be repeated exactly.
        key = jax.random.fold_in(jax.random.key(seed), step)
        with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh):
            prediction, history = model.apply(
                {"params": params}, observation, history, key, method="step"
            )
        arm = prediction.arm[0, 0].astype(jnp.float32)
        gripper = prediction.gripper
        if gripper is None:
            return arm, history
        if not model.gripper_is_number:
            # Above 0 is open, of logits and of values alike.
            gripper = gripper > 0
        gripper = gripper[0, 0].astype(jnp.float32)
        return jnp.concatenate([arm, gripper[:, None]], axis=-1), history

    return one
