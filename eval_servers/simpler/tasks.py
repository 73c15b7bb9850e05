"""SimplerEnv's tasks and the environments they are made of.

Source of all numbers: the evaluation scripts of SimplerEnv (scripts/rt1_*.sh and rt1x_bridge.sh
at commit 4ab7178) and the environments of ManiSkill2_real2sim (commit ef7a4d4); the paper is Li et
al., "Evaluating Real-World Robot Manipulation Policies in Simulation", CoRL 2024.

A *task* is a line of the published table; it has *parts* (the can lies or stands, a drawer is the
top one), and in a *setting* every part is run in several *variants* of its world. A score is of one
setting: pictures of different settings look different, and their rates are different quantities.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Tuple

GOOGLE, WIDOWX = "google_robot", "widowx"

# Line of the published table -> its parts, each run equally often.
TASKS: Dict[str, Tuple[str, ...]] = {
    "google_robot_pick_coke_can": (
        "google_robot_pick_horizontal_coke_can",
        "google_robot_pick_vertical_coke_can",
        "google_robot_pick_standing_coke_can",
    ),
    "google_robot_move_near": ("google_robot_move_near",),
    "google_robot_open_drawer": (
        "google_robot_open_top_drawer",
        "google_robot_open_middle_drawer",
        "google_robot_open_bottom_drawer",
    ),
    "google_robot_close_drawer": (
        "google_robot_close_top_drawer",
        "google_robot_close_middle_drawer",
        "google_robot_close_bottom_drawer",
    ),
    "google_robot_place_apple_in_closed_top_drawer": (
        "google_robot_place_apple_in_closed_top_drawer",
    ),
    "widowx_spoon_on_towel": ("widowx_spoon_on_towel",),
    "widowx_carrot_on_plate": ("widowx_carrot_on_plate",),
    "widowx_stack_cube": ("widowx_stack_cube",),
    "widowx_put_eggplant_in_basket": ("widowx_put_eggplant_in_basket",),
}


class Environment(NamedTuple):
    """One of the 25 names under which SimplerEnv offers its environments.

    Attributes:
        gym: id the simulator registers.
        instruction: what it says at first; "" where that depends on the start.
        steps: control steps of an episode.
        options: further arguments of the environment.
    """

    gym: str
    instruction: str
    steps: int
    options: Tuple[Tuple[str, Any], ...] = ()


def _drawers(name: str, gym: str, instruction: str, steps: int) -> Dict[str, Environment]:
    """Environments of one kind: one with a drawer left to chance, and one for each drawer."""
    single = {
        name.format(which + "_"): Environment(
            gym.format(which.title()), instruction.format(which), steps
        )
        for which in ("top", "middle", "bottom")
    }
    # Which drawer it is, the simulator decides at each reset, hence no instruction.
    return {name.format(""): Environment(gym.format(""), "", steps), **single}


CAN = "GraspSingleOpenedCokeCanInScene-v0"
NEAR = "MoveNearGoogleBakedTexInScene-v"
ENVIRONMENTS: Dict[str, Environment] = {
    "google_robot_pick_coke_can": Environment(CAN, "pick coke can", 80),
    "google_robot_pick_horizontal_coke_can": Environment(
        CAN, "pick coke can", 80, (("lr_switch", True),)
    ),
    "google_robot_pick_vertical_coke_can": Environment(
        CAN, "pick coke can", 80, (("laid_vertically", True),)
    ),
    "google_robot_pick_standing_coke_can": Environment(
        CAN, "pick coke can", 80, (("upright", True),)
    ),
    # An empty instruction means that it depends on the start, and only the simulator knows it.
    "google_robot_pick_object": Environment("GraspSingleRandomObjectInScene-v0", "", 80),
    "google_robot_move_near": Environment(NEAR + "1", "", 80),
    "google_robot_move_near_v0": Environment(NEAR + "0", "", 80),
    "google_robot_move_near_v1": Environment(NEAR + "1", "", 80),
    **_drawers("google_robot_open_{}drawer", "Open{}DrawerCustomInScene-v0", "open {} drawer", 113),
    **_drawers(
        "google_robot_close_{}drawer", "Close{}DrawerCustomInScene-v0", "close {} drawer", 113
    ),
    # The drawer is to be opened first.
    **_drawers(
        "google_robot_place_in_closed_{}drawer",
        "PlaceIntoClosed{}DrawerCustomInScene-v0",
        "open {} drawer",
        200,
    ),
    "google_robot_place_apple_in_closed_top_drawer": Environment(
        "PlaceIntoClosedTopDrawerCustomInScene-v0",
        "open top drawer",
        200,
        (("model_ids", "baked_apple_v2"),),
    ),
    "widowx_spoon_on_towel": Environment(
        "PutSpoonOnTableClothInScene-v0", "put the spoon on the towel", 60
    ),
    "widowx_carrot_on_plate": Environment("PutCarrotOnPlateInScene-v0", "put carrot on plate", 60),
    "widowx_stack_cube": Environment(
        "StackGreenCubeOnYellowCubeBakedTexInScene-v0",
        "stack the green block on the yellow block",
        60,
    ),
    "widowx_put_eggplant_in_basket": Environment(
        "PutEggplantInBasketScene-v0", "put eggplant into yellow basket", 120
    ),
}


def robot_of(name: str) -> str:
    """GOOGLE or WIDOWX, of a task or one of its environments."""
    return WIDOWX if name.startswith(WIDOWX) else GOOGLE


def kind_of(name: str) -> str:
    """pick, near, drawer, place (of the Google robot) or bridge."""
    if robot_of(name) == WIDOWX:
        return "bridge"
    # "open" and "close" are the two verbs that are left for drawers.
    verb = name[len(GOOGLE) + 1 :].split("_")[0]
    return {"pick": "pick", "move": "near", "place": "place"}.get(verb, "drawer")
