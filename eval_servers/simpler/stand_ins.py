"""A copy of SimplerEnv's assets in which plain boxes stand for what is missing: for tests only.

    python -m eval_servers.simpler.stand_ins --real2sim=DIR --out=DIR

Links what is there, writes a table for every missing stage and the collision shape in plain color
for every missing object, and lists them in OUT/stand_ins.json, from where they come into every
score. In the visual-matching setting a photograph covers the stage, so pictures are the real ones
there; contacts with a real table's rim are not.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from typing import Dict, List, Sequence, Tuple

import numpy as np

from eval_servers.simpler import assets
from eval_servers.simpler.tasks import ENVIRONMENTS
from eval_servers.simpler.worlds import World, settings_of, worlds

_TOP = 0.87  # meters, of every table top
# Robot -> the simulator's offset of the stage, and center and size of a table, x and y in meters.
_GOOGLE = ((-1.6616, -3.0337), (-0.295, 0.21), (0.63, 0.615))
_WIDOWX = ((-2.0634, -2.8313), (-0.2, 0.0), (1.0, 1.2))
_WOOD, _GREY = (0.39, 0.19, 0.08, 1.0), (0.3, 0.3, 0.3, 1.0)
# What objects that are known to be missing from some copies are colored.
_COLOURS = {"eggplant": (0.1, 0.02, 0.15, 1.0), "redbull": (0.05, 0.1, 0.5, 1.0)}

Mesh = Tuple[np.ndarray, np.ndarray]  # vertices float [v, 3], triangles int [t, 3]


def fill(files: assets.Files, needed: Sequence[World], out: str) -> Tuple[List[str], List[str]]:
    """Make OUT; returns (paths in it that are stand-ins, paths for which there is none).

    Rooms around the drawers and anything but pictures have none: worlds that need them stay
    refused.
    """
    contents: Dict[str, bytes] = {}
    hopeless = []
    tables = {
        stage: _WIDOWX if world.robot.startswith("widowx") else _GOOGLE
        for world in needed
        for stage in assets.stages(world)
        if not world.traced
    }
    for path in files.missing(needed):
        inside = os.path.relpath(path, files.data).replace(os.sep, "/")
        folder = inside[: -len("textured.*")] if inside.endswith("/textured.*") else ""
        shape = os.path.join(files.data, *folder.split("/"), "collision.obj")
        if inside in tables:
            contents[inside] = stage_glb(*tables[inside])
        elif folder and os.path.isfile(shape):
            colours = [colour for name, colour in _COLOURS.items() if name in folder]
            contents[folder + "textured.glb"] = glb([(read_obj(shape), (colours or [_GREY])[0])])
        else:
            hopeless.append(path)
    _link(files.data, out, set(contents))
    for inside, data in contents.items():
        place = os.path.join(out, *inside.split("/"))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place + ".tmp", "wb") as file:
            file.write(data)
        os.replace(place + ".tmp", place)
    with open(os.path.join(out, assets.STAND_INS), "w", encoding="utf-8") as file:
        json.dump(sorted(contents), file, indent=2)
    return sorted(contents), hopeless


def stage_glb(
    offset: Tuple[float, float], centre: Tuple[float, float], size: Tuple[float, float]
) -> bytes:
    """A table top and a floor, as GLB with y up, where the simulator expects its stage."""
    x, y = offset[0] + centre[0], offset[1] + centre[1]
    # The table is 5 cm thick; z of the simulator is y in GLB, and its y is -z.
    top = box((x, _TOP - 0.025, -y), (size[0], 0.05, size[1]))
    floor = box((offset[0], -0.005, -offset[1]), (8.0, 0.01, 8.0))
    return glb([(top, _WOOD), (floor, _GREY)])


def box(centre: Sequence[float], size: Sequence[float]) -> Mesh:
    """Twelve triangles, each corner once per side so that sides are flat."""
    vertices, triangles = [], []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for side in (-1, 1):
            start = len(vertices)
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                corner = np.zeros(3)
                corner[axis], corner[u], corner[v] = side, a * side, b
                vertices.append(np.asarray(centre) + corner * np.asarray(size) / 2)
            triangles += [(start, start + 1, start + 2), (start, start + 2, start + 3)]
    return np.array(vertices), np.array(triangles)


def read_obj(path: str) -> Mesh:
    """Vertices and triangles of a Wavefront file; polygons become fans."""
    vertices: List[List[float]] = []
    triangles: List[Tuple[int, int, int]] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if words[:1] == ["v"]:
                vertices.append([float(word) for word in words[1:4]])
            elif words[:1] == ["f"]:
                corners = [int(word.split("/")[0]) for word in words[1:]]
                # The format counts from 1, and negative numbers count back from the last vertex.
                corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
                # A fan from the first corner covers any convex face.
                for i in range(1, len(corners) - 1):
                    triangles.append((corners[0], corners[i], corners[i + 1]))
    return np.array(vertices), np.array(triangles)


def glb(parts: Sequence[Tuple[Mesh, Tuple[float, float, float, float]]]) -> bytes:
    """Colored meshes as one binary glTF 2.0 file, normals included."""
    chunks: List[bytes] = []
    views, accessors, primitives, materials = [], [], [], []

    def add(array: np.ndarray, kind: str, code: int, target: int) -> int:
        data = array.tobytes()
        offset = sum(len(chunk) for chunk in chunks)
        # glTF wants every view to start at a multiple of 4 bytes.
        chunks.append(data + b"\0" * (-len(data) % 4))
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(data), "target": target})
        entry = {
            "bufferView": len(views) - 1,
            "componentType": code,
            "count": len(array),
            "type": kind,
        }
        # The standard requires bounds for positions only, but readers accept them for normals.
        if kind == "VEC3":
            entry.update(min=array.min(0).tolist(), max=array.max(0).tolist())
        accessors.append(entry)
        return len(accessors) - 1

    for (vertices, triangles), colour in parts:
        corners = vertices[triangles]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        # A degenerate triangle has no normal; dividing by zero would write NaN.
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        # Every triangle with corners of its own: flat shading.
        places = corners.reshape(-1, 3).astype("<f4")
        upright = np.repeat(normals, 3, axis=0).astype("<f4")
        order = np.arange(len(places), dtype="<u4")
        attributes = {
            # 5126 = float32, 5125 = uint32, 34962 = vertices, 34963 = indices.
            "POSITION": add(places, "VEC3", 5126, 34962),
            "NORMAL": add(upright, "VEC3", 5126, 34962),
        }
        primitives.append(
            {
                "attributes": attributes,
                "indices": add(order, "SCALAR", 5125, 34963),
                "material": len(materials),
            }
        )
        shade = {"baseColorFactor": list(colour), "metallicFactor": 0.0, "roughnessFactor": 0.6}
        materials.append({"pbrMetallicRoughness": shade})
    binary = b"".join(chunks)
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": primitives}],
        "materials": materials,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(document).encode()
    # Chunks are padded to 4 bytes: JSON with spaces, binary with zeros.
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text
    body += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    # The header's 12 bytes are part of the length it states.
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def _link(source: str, out: str, paths: set) -> None:
    """Links in OUT to everything below `source`; folders only where `paths` lead into them."""
    os.makedirs(out, exist_ok=True)
    for name in sorted(os.listdir(source)):
        place, original = os.path.join(out, name), os.path.join(source, name)
        within = {path[len(name) + 1 :] for path in paths if path.startswith(name + "/")}
        if within and os.path.isdir(original):
            _link(original, place, within)
        elif name not in paths and not os.path.lexists(place):
            os.symlink(os.path.abspath(original), place)


def every_world() -> List[World]:
    """List the worlds of all environments in all settings."""
    return [
        world
        for name in ENVIRONMENTS
        for setting in settings_of(name)
        for world in worlds(name, setting).values()
    ]


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.simpler.stand_ins",
        description=(__doc__ or "").splitlines()[0],
    )
    add = parser.add_argument
    add("--real2sim", required=True, metavar="DIR", help="a ManiSkill2_real2sim source tree")
    add("--assets", default="", metavar="DIR", help="its assets (default: its folder data)")
    add("--out", required=True, metavar="DIR", help="folder to make")
    flags = parser.parse_args(arguments)
    try:
        files = assets.Files(flags.real2sim, flags.assets)
        written, hopeless = fill(files, every_world(), flags.out)
    except OSError as error:
        print("stand_ins: {}".format(error), file=sys.stderr)
        return 1
    print("{}: {} stand-ins".format(flags.out, len(written)))
    if hopeless:
        print("none for {}".format(", ".join(hopeless)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
