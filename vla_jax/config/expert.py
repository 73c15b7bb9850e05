"""The options of structure `expert`; the defaults are pi0.5's."""

from dataclasses import dataclass

from vla_jax.config.option import option


@dataclass(frozen=True)
class ExpertConfig:
    """A second, narrower stack of layers that reads the VLM's keys and values and acts."""

    # Gemma 300M, which openpi pretrained beside the VLM.
    width: int = option(1024, "Width of the expert.")
    hidden: int = option(4096, "Width of its MLP.")
    layers: int = option(0, "Its layers; 0 = as many as the VLM has, else a divisor of those.")
    adaptive: bool = option(
        True,
        "The time enters through the norms (pi0.5); else beside the noisy actions (pi0, SmolVLA).",
    )
    joint_every: int = option(
        1,
        "Of the VLM's layers each that many is attended to jointly with the expert's own tokens, "
        "the others alone (SmolVLA: 2).",
    )
    causal: bool = option(
        False, "Actions see those before them alone (SmolVLA); else all of the chunk."
    )
    state: str = option(
        "none",
        "Where the robot's state of `structure.proprio` numbers enters as a token: before the "
        "actions (pi0), behind the prompt (SmolVLA), nowhere (pi0.5, whose prompt says it).",
        "none",
        "expert",
        "prefix",
    )
    # openpi multiplies the text tokens alone, SmolVLA those of images as well.
    scaled_prefix: bool = option(
        False, "Image and text tokens are multiplied by the root of the VLM's width (SmolVLA)."
    )
    marks_before: tuple[int, ...] = option((), "Ids of tokens before every image (SmolVLA).")
    marks_behind: tuple[int, ...] = option((), "Ids of tokens behind every image.")
    prompt: str = option(
        "pi05",
        "Form of the prompt; pi05 and pi0fast have the robot's state in it.",
        "pi0",
        "pi05",
        "pi0fast",
        "smolvla",
    )
    images: str = option(
        "openpi",
        "How images are resized. openpi: with black margins on all sides, by Pillow's bilinear "
        "filter; lerobot: with margins above and left, bilinear without a filter (SmolVLA); "
        "backbone: as the VLM's own processor does.",
        "openpi",
        "lerobot",
        "backbone",
    )
    # pi0's pretrained maps take 32 numbers, whatever robot they are of.
    padded: int = option(32, "Width to which the state and the actions are padded with zeros.")
    # openpi's loss looks at all 32, so that the padding is learned to be zero.
    loss: str = option(
        "padded",
        "Numbers of an action that the loss looks at: the padded ones too (openpi), or the "
        "robot's (SmolVLA).",
        "padded",
        "real",
    )
    insulate: bool = option(
        False, "No gradient reaches the VLM from the expert (knowledge insulation)."
    )
    fast_weight: float = option(
        0.0,
        "Weight of the cross-entropy of the chunk's FAST tokens, which the VLM then learns to "
        "write behind its prompt, unseen by the expert; see `fast`. 0 = off.",
    )
