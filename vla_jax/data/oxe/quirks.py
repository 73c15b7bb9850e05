"""What the reference pipelines do that is a mistake or a matter of taste, and how to have it back.

Sources: octo, openvla, RoboVLMs and its copy of openvla's loader. `configs/oxe_robovlms.py` sets
all the knobs named here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Quirk:
    """One deviation of a reference pipeline.

    Attributes:
        theirs: what a reference does.
        ours: what is done here.
        parity: knobs that do it their way, path -> value; without any it cannot be had.
    """

    theirs: str
    ours: str
    parity: Mapping[str, Any] = field(default_factory=dict)


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        # Of trajectories of 40 steps and chunks of 10, the tenth action is supervised in 47 % of
        # the windows then, and in 78 % otherwise.
        "RoboVLMs relabels goals it does not use, and supervises no action beyond them",
        "no goals; every action of the trajectory counts",
        {"data.parity.random_goal": True},
    ),
    Quirk(
        # With a window of one and a chunk of ten it decodes 12 images to use one.
        "RoboVLMs decodes all images of the action chunk",
        "images of the window alone",
    ),
    Quirk(
        # Its operations share one stateless seed, so brightness, contrast, saturation and hue rise
        # and fall together, and the place of a crop lies on a diagonal.
        "dlimp draws all changes of an image from one number",
        "independent draws",
        {"augment.parity.draws": "shared"},
    ),
    Quirk(
        "openvla makes constant dimensions 0 even where the mask says not to scale: a gripper that "
        "is always open becomes closed",
        "the mask counts",
        {"data.parity.constant_to_zero": True},
    ),
    Quirk("octo counts one padded action too many as valid", "exact masks"),
    Quirk("octo never draws the last of several instructions", "all are equally likely"),
    Quirk(
        "octo's and openvla's draws of a camera depend on Python's hash seed",
        "on the camera's number in vla_jax.cameras.CAMERAS",
    ),
    Quirk(
        "RoboVLMs cuts at +-0.65 what q99 has cut already",
        "data.clip = 1; less is done, with a warning",
        {"data.clip": 0.65},
    ),
    Quirk(
        "RoboVLMs closes every gripper that is not exactly 1",
        "declared binary ones are cut at 0.5, the others stay continuous",
        {"data.parity.gripper": "exact"},
    ),
    Quirk(
        "RoboVLMs' mu-law and mean/std scaling spare the last time step instead of the gripper",
        "neither is offered; the gripper is never scaled",
    ),
    Quirk(
        # The two are a gray level apart on average, and up to 17 in single pixels.
        "TensorFlow decodes JPEGs with a fast DCT, most serving code with the accurate one",
        "the fast one, wherever a JPEG is decoded; data.parity.dct = accurate for the other",
    ),
    Quirk(
        "without a validation split, the last 5 % of the training trajectories are held out",
        "the same rule: data.val_fraction",
    ),
    Quirk(
        "statistics are of the training and validation data",
        "of the training data",
        {"data.parity.stats_split": "all"},
    ),
    Quirk(
        "images are squashed to the model's square",
        "as the model's own image processor does; squashed where a mixture's sizes differ",
    ),
)
