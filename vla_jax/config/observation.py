"""Under which keys a robot sends what a policy sees: known robots by name, others key by key.

A key is looked for as it stands first; where it is not there, its dots lead into nested maps, so
"images.cam_high" finds {"images": {"cam_high": ...}} and {"images.cam_high": ...} alike. Of several
keys the first that is there counts. `inference.robot_keys` reads observations by these tables.
"""

from dataclasses import dataclass, replace
from typing import Any

from vla_jax.config.option import option

# The rest of a state that the policy has more numbers for than the robot sends.
ZEROS = "zeros"


@dataclass(frozen=True)
class Profile:
    """What one kind of robot or client calls the parts of an observation.

    Attributes:
        images: camera role (`vla_jax.cameras.CAMERAS`) -> keys.
        state: parts of the state in their order: keys, of which KEY[a:b] takes some numbers only,
            constant numbers, and `ZEROS`.
        prompt: keys of the instruction.
    """

    images: dict[str, tuple[str, ...]]
    state: tuple[Any, ...] = ()
    prompt: tuple[str, ...] = ("prompt",)


# openpi's own examples and those who follow them; every policy also takes the names of the first.
OPENPI = Profile(
    {
        "primary": ("observation/image",),
        "secondary": ("observation/image_secondary",),
        "wrist": ("observation/wrist_image",),
    },
    ("observation/state",),
)
PROFILES = {
    "openpi": OPENPI,
    # openvla's data put a zero between the rotation and the fingers, which no client sends.
    "libero": replace(OPENPI, state=("observation/state[:6]", ZEROS, "observation/state[6:]")),
    "droid": Profile(
        {
            "primary": ("observation/exterior_image_1_left",),
            "secondary": ("observation/exterior_image_2_left",),
            "wrist": ("observation/wrist_image_left",),
        },
        ("observation/joint_position", "observation/gripper_position"),
    ),
    # DROID's robots too, with the exterior cameras counted from zero.
    "roboarena": Profile(
        {
            "primary": ("observation/exterior_image_0_left",),
            "secondary": ("observation/exterior_image_1_left",),
            "wrist": ("observation/wrist_image_left",),
        },
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": Profile(
        {
            "primary": ("images.cam_high",),
            "secondary": ("images.cam_right_wrist",),
            "wrist": ("images.cam_left_wrist",),
        },
        ("state",),
    ),
    # OpenVLA says "image", OpenVLA-OFT "full_image"; its ALOHA has a camera on each wrist.
    "openvla": Profile(
        {
            "primary": ("full_image", "image"),
            "secondary": ("right_wrist_image", "image_secondary"),
            "wrist": ("wrist_image", "left_wrist_image"),
        },
        ("state",),
        ("instruction",),
    ),
}


@dataclass(frozen=True)
class ObservationConfig:
    """The keys under which the robot sends its observations, for serving."""

    profile: str = option(
        "openpi", "A known robot or client; what the other keys here set replaces its.", *PROFILES
    )
    images: dict[str, Any] = option(
        {}, "Camera role -> its key, or several; dots lead into nested maps."
    )
    state: tuple[Any, ...] = option(
        (),
        "Parts of the robot's state in their order: keys, where KEY[a:b] takes some numbers only, "
        "constant numbers, and 'zeros' for what the policy takes beyond them.",
    )
    prompt: tuple[str, ...] = option((), "Keys of the instruction.")
    action_space: str = option(
        "",
        "What the numbers of an action are, for RoboArena's clients, which ask.",
        "",
        "joint_position",
        "joint_velocity",
        "cartesian_position",
        "cartesian_velocity",
    )
    aliases: tuple[str, ...] = option(
        (), "Further names of the dataset, by which OpenVLA's clients may ask for its units."
    )
