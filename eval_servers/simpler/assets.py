"""Which files a world draws, and which of them are missing: all of them, before anything starts.

SAPIEN logs a line for a mesh that is not there and goes on without it: objects fall through an
absent table, an absent can is invisible, and the score is that of another task.
"""

from __future__ import annotations

import json
import os
import re
from typing import Dict, Iterable, List, Set, Tuple

from eval_servers.simpler.worlds import World

_MODELS, _STAGES = "custom/models", "hab2_bench_assets/stages"
_VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # the first that is there is drawn
_ROBOTS = {
    "google_robot_static": "googlerobot_description/google_robot_meta_sim_fix_wheel_fix_fingertip",
    "widowx": "widowx_description/wx250s",
}
_DESCRIPTIONS = "mani_skill2_real2sim/assets/descriptions"
STAND_INS = "stand_ins.json"  # in a folder that `stand_ins` made: what in it is not the real thing

_RANDOM = [
    "opened_pepsi_can",
    "opened_coke_can",
    "opened_sprite_can",
    "opened_fanta_can",
    "opened_redbull_can",
    "blue_plastic_bottle",
    "apple",
    "orange",
    "sponge",
    "bridge_spoon_generated_modified",
    "bridge_carrot_generated_modified",
    "green_cube_3cm",
    "yellow_cube_3cm",
    "eggplant",
]
_FEW = ["opened_pepsi_can", "apple", "sponge", "orange"]
_MANY = [
    "opened_7up_can",
    "opened_sprite_can",
    "sponge",
    "orange",
    "opened_fanta_can",
    "bridge_spoon_generated_modified",
]


def _near(form: str) -> List[str]:
    """The objects of "move near": two always as they are, six in one of three makes."""
    cans = [form.format("opened_{}_can".format(n)) for n in ("pepsi", "7up", "coke", "redbull")]
    return ["blue_plastic_bottle", "orange", form.format("apple"), form.format("sponge"), *cans]


# Start of an environment's id -> the objects it loads besides those named in its options.
_OBJECTS: Dict[str, List[str]] = {
    "GraspSingleRandomObject": _RANDOM,
    "GraspSingleOpenedCokeCan": ["opened_coke_can"],
    "MoveNearGoogleBakedTexInScene-v0": _near("baked_{}"),
    "MoveNearGoogleBakedTexInScene-v1": _near("baked_{}_v2"),
    "MoveNearGoogleInScene": _near("{}"),
    "MoveNearAltGoogleCamera": _near("{}"),
    "PutSpoonOnTableCloth": ["bridge_spoon_generated_modified", "table_cloth_generated_shorter"],
    "PutCarrotOnPlate": ["bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"],
    "StackGreenCubeOnYellowCubeBakedTex": ["baked_green_cube_3cm", "baked_yellow_cube_3cm"],
    "PutEggplantInBasket": ["eggplant", "sink", "dummy_sink_target_plane"],
}


class Files:
    """Folders of a simulator's files, and what is missing in them.

    Attributes:
        tree: a ManiSkill2_real2sim source tree; robots are in it.
        data: folder of its assets, its own `data` unless named.
    """

    def __init__(self, tree: str, data: str = "") -> None:
        self.tree = tree
        self.data = data or os.path.join(tree, "data")

    def missing(self, worlds: Iterable[World]) -> List[str]:
        """Paths that are needed and absent, or empty, each once."""
        needed: Dict[Tuple[str, ...], None] = {}
        for world in worlds:
            needed.update(dict.fromkeys(self._needed(world)))
        return [
            # Several paths are formats of one file, of which any will do: name it without its
            # ending.
            paths[0] if len(paths) == 1 else re.sub(r"\.\w+$", ".*", paths[0])
            for paths in needed
            if not any(_whole(path) for path in paths)
        ]

    def stand_ins(self) -> List[str]:
        """List the files of these assets that are only stand-ins."""
        path = os.path.join(self.data, STAND_INS)
        if not os.path.isfile(path):
            return []
        with open(path, encoding="utf-8") as file:
            return list(json.load(file))

    def _needed(self, world: World) -> List[Tuple[str, ...]]:
        """List the files a world needs, each as one path or as several of which one will do."""
        options = dict(world.options)
        needed: List[Tuple[str, ...]] = [(self._in_data(stage),) for stage in stages(world)]
        photographs = [world.overlay] if world.overlay else []
        if world.prepackaged:
            # The environment chooses its overlay itself, so all it may choose must be there.
            photographs = _photographs(world)
        needed += [(self._in_data("real_inpainting/" + each),) for each in photographs]
        for model in self._models(world):
            folder = "{}/{}/".format(_MODELS, model)
            needed.append((self._in_data(folder + "collision.obj"),))
            needed.append(tuple(self._in_data(folder + each) for each in _VISUALS))
        if world.traced:
            # A prepackaged environment chooses the station itself, and takes the recolored one.
            recoloured = "mk_station_recolor" if world.prepackaged else "mk_station"
            station = "custom/{}.urdf".format(options.get("station_name", recoloured))
            needed += self._description(self._in_data(station))
        arms = [str(options.get("urdf_version", "None"))]
        if world.prepackaged and world.robot == "google_robot_static":
            arms = [""] + ["recolor_tabletop_visual_matching_" + n for n in "12"]
            arms += ["recolor_cabinet_visual_matching_1"]
        robot = _ROBOTS["widowx" if world.robot.startswith("widowx") else world.robot]
        for arm in arms:
            name = robot + ("_" + arm if arm not in ("", "None") else "") + ".urdf"
            needed += self._description(os.path.join(self.tree, *_DESCRIPTIONS.split("/"), name))
        return needed

    def _models(self, world: World) -> List[str]:
        options = dict(world.options)
        needed = [
            model
            for start, models in _OBJECTS.items()
            if world.gym.startswith(start)
            for model in models
        ]
        if "Distractor" in world.gym:
            needed += _MANY if options.get("distractor_config") == "more" else _FEW
        named = options.get("model_ids")
        if named:
            needed.append(str(named))
        elif world.gym.startswith("PlaceInto"):
            path = self._in_data("custom/info_pick_custom_baked_tex_v1.json")
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    needed += sorted(json.load(file))
        # Lists overlap, and each file is to be reported once.
        return list(dict.fromkeys(needed))

    def _description(self, urdf: str) -> List[Tuple[str, ...]]:
        """A URDF and every mesh it names."""
        meshes: Set[str] = set()
        if os.path.isfile(urdf):
            with open(urdf, encoding="utf-8") as file:
                meshes = set(re.findall(r'filename="([^"]+)"', file.read()))
        folder = os.path.dirname(urdf)
        return [(urdf,)] + [(os.path.join(folder, mesh),) for mesh in sorted(meshes)]

    def _in_data(self, path: str) -> str:
        return os.path.join(self.data, *path.split("/"))


def stages(world: World) -> List[str]:
    """Path within the assets of a world's stage; none if the simulator draws a bare floor."""
    scene = world.scene
    if world.prepackaged and not world.traced:
        names = {"widowx": "bridge_table_1_v1", "widowx_sink_camera_setup": "bridge_table_1_v2"}
        scene = names.get(world.robot, "google_pick_coke_can_1_v4")
    return ["{}/{}.glb".format(_STAGES, scene)] if scene and "dummy" not in scene else []


def _photographs(world: World) -> List[str]:
    """Photographs that a prepackaged environment chooses from."""
    if world.robot.startswith("widowx"):
        return ["bridge_real_eval_1.png" if world.robot == "widowx" else "bridge_sink.png"]
    if world.gym.startswith("MoveNear"):
        return ["google_move_near_real_eval_1.png"]
    if not world.traced:
        return ["google_coke_can_real_eval_1.png"]
    numbers = "0" if world.gym.startswith("PlaceInto") else "012"
    return ["open_drawer_{}{}.png".format(row, n) for row in "abc" for n in numbers]


def _whole(path: str) -> bool:
    """Whether a file is there and is more than a pointer to where it is kept."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(40)
    return bool(start) and not start.startswith(b"version https://git-lfs")
