"""The contract everything else speaks: what one batch is, to the shape, dtype and range.

Legend of axis letters, used across the code base:
    b batch · w window (history steps) · f chunk (future actions) · a action dimension
    h, x image height and width · t text columns · n tokens · d features · p proprio dimension
The b of a field's type is any number of leading axes: a single row has none, a split batch two.

The same classes hold numpy arrays on the host, jax arrays on the device and shape structs under
tracing. They are pytrees. The tests check dtypes and shapes wherever one is constructed.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8, UInt32

# What a field may hold. Type checkers see Any: numpy's and jax's arrays share no type that has
# arithmetic, and shape structs, which have none at all, occur under tracing alone.
if TYPE_CHECKING:
    ArrayT: TypeAlias = Any
else:
    ArrayT = jax.Array | np.ndarray | jax.ShapeDtypeStruct

T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree, each field a child but those declared by `static`.

    Unlike `jax.tree_util.register_dataclass` it rebuilds an instance without `__init__`: what jax
    puts into the fields on its way (shardings, axes, arrays with another leading dimension, None)
    has not the types they declare, and is not to be checked against them.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields if not field.metadata.get("static")]
    fixed = [field.name for field in fields if field.metadata.get("static")]
    # With these the paths in jax's error messages name the fields.
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def children(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, name) for name in names), tuple(getattr(x, name) for name in fixed)

    def named(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values, settings = children(x)
        return tuple(zip(keys, values, strict=True)), settings

    def rebuild(settings: tuple[Any, ...], values: Any) -> T:
        x = object.__new__(cls)
        for name, value in zip((*names, *fixed), (*values, *settings), strict=True):
            # The dataclass is frozen, and its own `__init__` is not to run.
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, named, rebuild, children)
    return cls


def static(default: Any) -> Any:
    """A field of a pytree that is no array: programs are compiled for its value."""
    return dataclasses.field(default=default, metadata={"static": True})


@pytree
@dataclass(frozen=True)
class Guide:
    """What a sampled chunk is to agree with: the part of the last chunk that is still executed.

    Attributes:
        previous: float32 [b, f, v] that part in the model's values, beginning at the present;
            zeros behind its end. v may be less than the width a model denoises, whose padding is
            then guided to 0.
        weights: float32 [b, f], 1 = as before, 0 = free.
        limit: the strongest correction.
        jacobian: whether the error goes back through the network, see `heads.guidance`.
    """

    previous: Float[ArrayT, "*b f v"]
    weights: Float[ArrayT, "*b f"]
    limit: float = static(5.0)
    jacobian: bool = static(True)


@pytree
@dataclass(frozen=True)
class Observation:
    """What the robot has seen and been told.

    Attributes:
        images: camera role -> uint8 [b, w, h, x, 3], RGB, any size; the model's size is made on
            the device. After `preprocess` the same field holds float32 in the backbone's units.
        image_mask: camera role -> bool [b, w]; False where the frame is padding left of the
            trajectory's start (its pixels repeat the first frame) or the dataset has no such
            camera (black).
        text: int32 [b, t] token ids, padded on the right to a fixed t.
        text_mask: bool [b, t], True on real tokens.
        proprio: float32 [b, w, p] normalized robot state, or None when the model takes none.
        sentence: float32 [b, s] unit vector of the instruction from a text encoder, which training
            may ask the features to predict; else None.
        guide: in serving, what sampled actions are to agree with; else None.
    """

    images: dict[str, UInt8[ArrayT, "*b w _ _ 3"] | Float[ArrayT, "*b w _ _ 3"]]
    image_mask: dict[str, Bool[ArrayT, "*b w"]]
    text: Int32[ArrayT, "*b t"]
    text_mask: Bool[ArrayT, "*b t"]
    proprio: Float[ArrayT, "*b w p"] | None = None
    sentence: Float[ArrayT, "*b s"] | None = None
    guide: Guide | None = None


@pytree
@dataclass(frozen=True)
class Actions:
    """Supervision: at every window step the chunk that starts there.

    Attributes:
        chunk: float32 [b, w, f, a]; element [i, j, k] is the action at frame j + k of the window.
            Arm dimensions are normalized to [-1, 1]; a gripper is last, 1 = open, 0 = closed.
        mask: bool [b, w, f]; False beyond the end of the trajectory and left of its start.
        written: int32 [b, n] ids of a text that says the newest step's chunk, -1 behind its end;
            None where the model writes no text.
    """

    chunk: Float[ArrayT, "*b w f a"]
    mask: Bool[ArrayT, "*b w f"]
    written: Int32[ArrayT, "*b n"] | None = None


@pytree
@dataclass(frozen=True)
class Captions:
    """Texts about images, for training the VLM's language beside the actions.

    Attributes:
        images: uint8 [b, h, x, 3], RGB.
        has_image: bool [b]; False where a text has none (its pixels are black).
        text: int32 [b, t] token ids, padded on the right to a fixed t.
        text_mask: bool [b, t], True on real tokens.
        target: bool [b, t], True on tokens that are to be predicted: the answers.
    """

    images: UInt8[ArrayT, "*b h x 3"]
    has_image: Bool[ArrayT, "*b"]
    text: Int32[ArrayT, "*b t"]
    text_mask: Bool[ArrayT, "*b t"]
    target: Bool[ArrayT, "*b t"]


@pytree
@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        observation: see `Observation`.
        actions: see `Actions`.
        sample: uint32 [b, 2], the global sample number as (high, low) words: the only source of
            randomness for augmentation, so pixels do not depend on topology or on a restart.
        dataset: int32 [b], index of the sample's dataset in the mixture.
        captions: rows of their own beside the windows, or None.
    """

    observation: Observation
    actions: Actions
    sample: UInt32[ArrayT, "*b 2"]
    dataset: Int32[ArrayT, "*b"]
    captions: Captions | None = None


@pytree
@dataclass(frozen=True)
class Prediction:
    """What a head returns.

    Attributes:
        arm: float32 [b, w, f, a-1], normalized, in [-1, 1]; [b, w, f, a] without a gripper.
        gripper: float32 [b, w, f], above 0 is open: the logit of "open" from heads trained with
            cross-entropy, the predicted value itself from the others. None without a gripper.
    """

    arm: Float[ArrayT, "*b w f arm"]
    gripper: Float[ArrayT, "*b w f"] | None
