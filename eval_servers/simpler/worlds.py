"""How each environment is built and reset, in each setting of the published evaluation.

Sources: see `tasks`. The numbers of variants and starts are the evaluation's own, so that a plain
mean over a task's episodes is its published mean of means.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from eval_servers.simpler.tasks import (
    CAN,
    ENVIRONMENTS,
    NEAR,
    TASKS,
    WIDOWX,
    Environment,
    kind_of,
    robot_of,
)

SETTINGS = ("visual_matching", "variant_aggregation", "camera_variants", "prepackaged")


class World(NamedTuple):
    """How to build one environment; everything else is decided when it is reset.

    Attributes:
        gym: id the simulator registers.
        robot: the simulator's name of it, cameras included.
        scene: its stage; "" with `prepackaged`.
        overlay: photograph that replaces the background; "" = none.
        traced: whether the published evaluation draws it by ray tracing.
        options: further arguments of the environment.
        prepackaged: let the environment choose its own robot, scene and overlay.
    """

    gym: str
    robot: str = "google_robot_static"
    scene: str = ""
    overlay: str = ""
    traced: bool = False
    options: Tuple[Tuple[str, Any], ...] = ()
    prepackaged: bool = False


class Start(NamedTuple):
    """How to reset an environment.

    Attributes:
        robot: where its base stands (x, y in meters, yaw in radians); None = its own choice.
        place: x, y of the object, in meters.
        episode: number in the environment's own list of starts.
        seed: of its random choices, where there is no list.
    """

    robot: Optional[Tuple[float, float, float]] = None
    place: Optional[Tuple[float, float]] = None
    episode: Optional[int] = None
    seed: Optional[int] = None


# What the robot's arm looks like in the visual-matching setting; None = as it comes.
_ARMS = (
    "None",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
# Robot in front of the drawers in visual matching: x, y (meters), yaw (radians).
_STANDS = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
# Names of stages, arms and photographs are those of the simulator's asset files.
_TABLE = "google_pick_coke_can_1_v4"
_TABLES = {
    "background 1": _TABLE + "_alt_background",
    "background 2": _TABLE + "_alt_background_2",
    "table 1": "Baked_sc1_staging_objaverse_cabinet1_h870",
    "table 2": "Baked_sc1_staging_objaverse_cabinet2_h870",
}
_LIGHTS = {"darker": "slightly_darker_lighting", "brighter": "slightly_brighter_lighting"}
_KITCHEN = "frl_apartment_stage_simple"
_KITCHENS = {"background 1": "modern_bedroom_no_roof", "background 2": "modern_office_no_roof"}


def worlds(name: str, setting: str) -> Dict[str, World]:
    """Variant -> world of one environment in one setting, in the order of the evaluation.

    Raises:
        ValueError: this setting does not have it; says which do.
    """
    environment = ENVIRONMENTS[name]
    if setting == "prepackaged":
        robot = _bridge(name).robot if robot_of(name) == WIDOWX else "google_robot_static"
        traced = kind_of(name) in ("drawer", "place")
        options = environment.options
        return {"prepackaged": World(environment.gym, robot, "", "", traced, options, True)}
    if setting not in settings_of(name):
        raise ValueError(
            "{} has no setting {}; it has {}".format(name, setting, ", ".join(settings_of(name)))
        )
    return _VARIANTS[kind_of(name), setting](name, environment)


def settings_of(name: str) -> Tuple[str, ...]:
    """The settings of an environment."""
    # Other environments exist in the simulator only as they come, prepackaged.
    published = any(name in parts for parts in TASKS.values())
    kind = kind_of(name)
    return tuple(
        setting
        for setting in SETTINGS
        if setting == "prepackaged" or (published and (kind, setting) in _VARIANTS)
    )


def _bridge(name: str) -> World:
    if name == "widowx_put_eggplant_in_basket":
        # The eggplant task was filmed at a sink, with a camera of its own.
        robot, scene, overlay = "widowx_sink_camera_setup", "bridge_table_1_v2", "bridge_sink.png"
    else:
        robot, scene, overlay = "widowx", "bridge_table_1_v1", "bridge_real_eval_1.png"
    return World(ENVIRONMENTS[name].gym, robot, scene, overlay)


def _bridge_matching(name: str, environment: Environment) -> Dict[str, World]:
    return {"base": _bridge(name)}


def _arms(world: World) -> Dict[str, World]:
    return {arm: _with(world, urdf_version=arm) for arm in _ARMS}


def _with(world: World, **options: Any) -> World:
    return world._replace(options=(*world.options, *options.items()))


def _pick_matching(name: str, environment: Environment) -> Dict[str, World]:
    overlay = "google_coke_can_real_eval_1.png"
    return _arms(World(CAN, scene=_TABLE, overlay=overlay, options=environment.options))


def _near_matching(name: str, environment: Environment) -> Dict[str, World]:
    # Published with version 0 of the baked objects; the 25 names default to version 1.
    return _arms(World(NEAR + "0", scene=_TABLE, overlay="google_move_near_real_eval_1.png"))


def _tabletops(base: World) -> Dict[str, World]:
    """Backgrounds, lights and tables of the two table-top tasks."""
    lights = {"light " + name: _with(base, **{key: True}) for name, key in _LIGHTS.items()}
    return {**{name: base._replace(scene=scene) for name, scene in _TABLES.items()}, **lights}


def _pick_variants(name: str, environment: Environment) -> Dict[str, World]:
    base = World(CAN, scene=_TABLE, options=environment.options)
    distracted = base._replace(gym="GraspSingleOpenedCokeCanDistractorInScene-v0")
    return {
        "base": base,
        **_tabletops(base),
        "distractors less": distracted,
        "distractors more": _with(distracted, distractor_config="more"),
    }


def _near_variants(name: str, environment: Environment) -> Dict[str, World]:
    base = World("MoveNearGoogleInScene-v0", scene=_TABLE)
    return {"base": base, **_tabletops(base), "distractors none": _with(base, no_distractor=True)}


def _pick_cameras(name: str, environment: Environment) -> Dict[str, World]:
    gym = "GraspSingleOpenedCokeCanAltGoogleCamera{}InScene-v0"
    base = World(CAN, scene=_TABLE, options=environment.options)
    # The simulator gives the first of its other cameras no number.
    return {"camera " + n: base._replace(gym=gym.format(n.replace("1", ""))) for n in "12"}


def _near_cameras(name: str, environment: Environment) -> Dict[str, World]:
    gym = "MoveNearAltGoogleCamera{}InScene-v0"
    return {"camera " + n: World(gym.format(n.replace("1", "")), scene=_TABLE) for n in "12"}


def _drawer_matching(name: str, environment: Environment) -> Dict[str, World]:
    base = World(environment.gym, scene="dummy_drawer", traced=True, options=environment.options)
    base = _with(
        base, station_name="mk_station_recolor", light_mode="simple", disable_bad_material=True
    )
    # Placing into the drawer is published from a0, b0 and c0 only.
    stands = [stand for stand in _STANDS if kind_of(name) == "drawer" or stand.endswith("0")]
    return {
        "{} {}".format(arm, stand): world._replace(overlay="open_drawer_{}.png".format(stand))
        for arm, world in _arms(base).items()
        for stand in stands
    }


def _drawer_variants(name: str, environment: Environment) -> Dict[str, World]:
    base = World(environment.gym, scene=_KITCHEN, traced=True)
    if kind_of(name) == "place":
        base = _with(base, model_ids="apple")
    return {
        "base": base,
        **{variant: base._replace(scene=scene) for variant, scene in _KITCHENS.items()},
        "light brighter": _with(base, light_mode="brighter"),
        "light darker": _with(base, light_mode="darker"),
        "cabinet 2": _with(base, station_name="mk_station2"),
        "cabinet 3": _with(base, station_name="mk_station3"),
    }


_VARIANTS = {
    ("pick", "visual_matching"): _pick_matching,
    ("near", "visual_matching"): _near_matching,
    ("drawer", "visual_matching"): _drawer_matching,
    ("place", "visual_matching"): _drawer_matching,
    ("bridge", "visual_matching"): _bridge_matching,
    ("pick", "variant_aggregation"): _pick_variants,
    ("near", "variant_aggregation"): _near_variants,
    ("drawer", "variant_aggregation"): _drawer_variants,
    ("place", "variant_aggregation"): _drawer_variants,
    # Published beside the aggregate, not as a part of it.
    ("pick", "camera_variants"): _pick_cameras,
    ("near", "camera_variants"): _near_cameras,
}


def starts(name: str, setting: str, variant: str) -> List[Start]:
    """All starts in one variant, in the order of the evaluation."""
    kind, matching = kind_of(name), setting == "visual_matching"
    if setting == "prepackaged":
        # These kinds have a fixed list of starts; the others draw theirs from a seed.
        listed = {"bridge": 24, "near": 60}.get(kind)
        if listed:
            return [Start(episode=number, seed=number) for number in range(listed)]
        return [Start(seed=number) for number in range(100)]
    if kind == "bridge":
        x, y = (0.127, 0.06) if name == "widowx_put_eggplant_in_basket" else (0.147, 0.028)
        return [Start((x, y, 0.0), episode=number) for number in range(24)]
    if kind == "near":
        return [Start((0.35, 0.21, -0.09), episode=number) for number in range(60)]
    if kind == "pick":
        # 5 by 5 places in meters, as in SimplerEnv's own scripts.
        places = _grid((-0.35, -0.12, 5), (-0.02, 0.42, 5))
        return [Start((0.35, 0.2, 0.0), place) for place in places]
    if matching:
        robots = [_STANDS[variant.split()[-1]]]
    elif kind == "drawer":
        robots = [(x, y, 0.0) for x, y in _grid((0.65, 0.85, 3), (-0.2, 0.2, 3))]
    else:
        robots = [(x, y, 0.0) for x, y in _grid((0.65, 0.65, 1), (-0.2, 0.2, 3))]
    apples = _grid((-0.08, -0.02, 3), (-0.02, 0.08, 3))
    places = apples if kind == "place" else [(0.0, 0.0)]
    return [Start(robot, place) for robot in robots for place in places]


def _grid(xs: Tuple[float, float, int], ys: Tuple[float, float, int]) -> List[Tuple[float, float]]:
    return [(float(x), float(y)) for x in np.linspace(*xs) for y in np.linspace(*ys)]
