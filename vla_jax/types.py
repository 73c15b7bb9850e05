"""The contract everything else speaks: what one batch is, to the shape, dtype and range.

Legend of axis letters, used across the code base:
    b batch · w window (history steps) · f chunk (future actions) · a action dimension
    h, x image height and width · t text columns · n tokens · d features · p proprio dimension

The same classes hold numpy arrays on the host, jax arrays on the device and shape structs under
tracing; they are registered as pytrees.
"""

from dataclasses import dataclass
from typing import Any

import jax

# Camera roles. A dataset or a robot maps its own camera names onto these.
CAMERAS = ("primary", "secondary", "wrist")


@jax.tree_util.register_dataclass
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
        proprio: float32 [b, w, p] normalised robot state, or None when the model takes none.
        sentence: float32 [b, s] unit vector of the instruction from a text encoder, which training
            may ask the features to predict; else None.
    """

    images: dict[str, Any]
    image_mask: dict[str, Any]
    text: Any
    text_mask: Any
    proprio: Any = None
    sentence: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Actions:
    """Supervision: at every window step the chunk that starts there.

    Attributes:
        chunk: float32 [b, w, f, a]; element [i, j, k] is the action at frame j + k of the window.
            Arm dimensions are normalised to [-1, 1]; the gripper is 1 = open, 0 = closed.
        mask: bool [b, w, f]; False beyond the end of the trajectory and left of its start.
    """

    chunk: Any
    mask: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Future:
    """What the cameras see after the window, for a model that predicts images.

    Attributes:
        images: camera role -> uint8 [b, n, h, x, 3], RGB, the n frames after the window's last;
            beyond the trajectory's end they repeat the last one.
        mask: bool [b, n], False beyond the end.
    """

    images: dict[str, Any]
    mask: Any


@jax.tree_util.register_dataclass
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

    images: Any
    has_image: Any
    text: Any
    text_mask: Any
    target: Any


@jax.tree_util.register_dataclass
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
        future: see `Future`; None unless a model asks for it.
    """

    observation: Observation
    actions: Actions
    sample: Any
    dataset: Any
    captions: Captions | None = None
    future: Future | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    """What a head returns.

    Attributes:
        arm: float32 [b, w, f, a-1], normalised, in [-1, 1].
        gripper: float32 [b, w, f], above 0 is open: the logit of "open" from heads trained with
            cross-entropy, the predicted value itself from the others.
    """

    arm: Any
    gripper: Any
