"""Files that SimplerEnv would do without in silence, and the stand-ins for tests."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from eval_servers import aside, graphics
from eval_servers.simpler import assets, probe, simulator, stand_ins
from eval_servers.simpler.worlds import worlds

ARM = "mani_skill2_real2sim/assets/descriptions/widowx_description"
MESHES = ("arm.obj", "hand.stl")
CUBES = ("baked_green_cube_3cm", "baked_yellow_cube_3cm")
CUBE_OBJ = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\n"


@pytest.fixture
def tree(tmp_path):
    """All files of the stack-cube task, and nothing else."""
    files = {
        "mani_skill2_real2sim/envs/sapien_env.py": "",
        f"{ARM}/wx250s.urdf": "".join(f'<mesh filename="meshes/{name}"/>' for name in MESHES),
        **{f"{ARM}/meshes/{name}": "mesh" for name in MESHES},
        "data/hab2_bench_assets/stages/bridge_table_1_v1.glb": "glTF",
        "data/real_inpainting/bridge_real_eval_1.png": "png",
        **{f"data/custom/models/{cube}/collision.obj": CUBE_OBJ for cube in CUBES},
        **{f"data/custom/models/{cube}/textured.dae": "dae" for cube in CUBES},
    }
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def needed(name="widowx_stack_cube", setting="visual_matching"):
    return list(worlds(name, setting).values())


def missing(tree, *names, **options):
    result = assets.Files(str(tree)).missing(needed(*names, **options))
    return [str(Path(path).relative_to(tree)) for path in result]


def test_nothing_is_missing(tree):
    assert missing(tree) == []
    assert missing(tree, setting="prepackaged") == []
    simulator.check(simulator.Settings(str(tree)), needed())


def test_everything_that_is_missing_at_once(tree):
    data = tree / "data"
    (data / "hab2_bench_assets/stages/bridge_table_1_v1.glb").unlink()
    (data / "real_inpainting/bridge_real_eval_1.png").write_text("")
    (data / f"custom/models/{CUBES[0]}/textured.dae").unlink()
    (data / f"custom/models/{CUBES[1]}/collision.obj").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    (tree / ARM / "meshes/hand.stl").unlink()
    names = {
        "data/hab2_bench_assets/stages/bridge_table_1_v1.glb",
        "data/real_inpainting/bridge_real_eval_1.png",
        f"data/custom/models/{CUBES[0]}/textured.*",
        f"data/custom/models/{CUBES[1]}/collision.obj",
        f"{ARM}/meshes/hand.stl",
    }
    assert set(missing(tree)) == names
    with pytest.raises(simulator.SimulatorError, match="5 files are missing") as error:
        simulator.check(simulator.Settings(str(tree)), needed())
    assert all(Path(name).name in str(error.value) for name in names)


def test_any_visual_will_do(tree):
    folder = tree / "data/custom/models" / CUBES[0]
    (folder / "textured.dae").rename(folder / "textured.glb")
    assert missing(tree) == []


def test_what_other_tasks_draw(tree):
    result = missing(tree, "google_robot_open_top_drawer")
    photographs = [path for path in result if path.endswith(".png")]
    assert len(photographs) == 9
    assert "data/custom/mk_station_recolor.urdf" in result
    assert sum("google_robot_meta_sim" in path for path in result) == 4  # arms of four looks
    assert not any("stages" in path for path in result)  # a bare floor
    result = missing(tree, "google_robot_move_near", setting="variant_aggregation")
    assert sum("stages" in path for path in result) == 5
    assert "data/custom/models/opened_redbull_can/collision.obj" in result
    result = missing(tree, "google_robot_move_near")
    assert "data/custom/models/baked_opened_redbull_can/collision.obj" in result
    result = missing(tree, "google_robot_pick_vertical_coke_can", setting="variant_aggregation")
    for model in ("opened_coke_can", "opened_fanta_can", "opened_pepsi_can"):
        assert f"data/custom/models/{model}/collision.obj" in result
    (tree / "data/custom/info_pick_custom_baked_tex_v1.json").write_text('{"cup": {}}')
    result = missing(tree, "google_robot_place_in_closed_drawer", setting="prepackaged")
    assert "data/custom/models/cup/collision.obj" in result
    assert sum(path.endswith(".png") for path in result) == 3


def read_glb(path):
    data = Path(path).read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON"
    document, start = json.loads(data[20 : 20 + size]), 20 + size
    size, kind = struct.unpack_from("<I4s", data, start)
    assert (kind, start + 8 + size) == (b"BIN\0", len(data))
    assert document["buffers"][0]["byteLength"] == size
    binary = data[start + 8 :]
    meshes = []
    for primitive in document["meshes"][0]["primitives"]:
        arrays = []
        for key in ("POSITION", "NORMAL"):
            accessor = document["accessors"][primitive["attributes"][key]]
            view = document["bufferViews"][accessor["bufferView"]]
            raw = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
            arrays.append(np.frombuffer(raw, "<f4").reshape(accessor["count"], 3))
        meshes.append(arrays)
    return meshes


def test_stand_ins_make_the_check_pass(tree, tmp_path, capsys):
    (tree / "data/hab2_bench_assets/stages/bridge_table_1_v1.glb").unlink()
    (tree / f"data/custom/models/{CUBES[0]}/textured.dae").unlink()
    out = tmp_path / "out"
    files = assets.Files(str(tree))
    created, hopeless = stand_ins.fill(files, needed(), str(out))
    assert hopeless == []
    assert created == [
        f"custom/models/{CUBES[0]}/textured.glb",
        "hab2_bench_assets/stages/bridge_table_1_v1.glb",
    ]
    filled = assets.Files(str(tree), str(out))
    assert filled.missing(needed()) == []
    assert filled.stand_ins() == created
    assert simulator.describe(simulator.Settings(str(tree), str(out)))["stand_ins"] == created
    assert files.stand_ins() == []
    # What was there is linked, nothing in the source is touched.
    assert (out / "real_inpainting").is_symlink()
    assert not (tree / "data/hab2_bench_assets/stages/bridge_table_1_v1.glb").exists()
    table, floor = read_glb(out / "hab2_bench_assets/stages/bridge_table_1_v1.glb")
    # After a quarter turn about x and minus the stage's offset: the table's top is at 0.87 m, its
    # middle at (-0.2, 0), which is in front of the robot.
    x, y, z = table[0].T
    assert y.max() == pytest.approx(0.87)
    assert (x.min() + x.max()) / 2 + 2.0634 == pytest.approx(-0.2, abs=1e-6)
    assert -(z.min() + z.max()) / 2 + 2.8313 == pytest.approx(0, abs=1e-6)
    assert floor[0][:, 1].max() == pytest.approx(0)
    (cube,) = read_glb(out / f"custom/models/{CUBES[0]}/textured.glb")
    assert np.allclose(cube[1], [0, 0, 1])
    assert len(cube[0]) == 6  # a square in two triangles


def test_what_nothing_can_stand_for(tree, tmp_path):
    (tree / ARM / "meshes/arm.obj").unlink()
    files = assets.Files(str(tree))
    _, hopeless = stand_ins.fill(files, needed(), str(tmp_path / "out"))
    assert [Path(path).name for path in hopeless] == ["arm.obj"]


def test_boxes_face_outwards():
    vertices, triangles = stand_ins.box((1, 2, 3), (2, 4, 6))
    assert vertices.min(0).tolist() == [0, 0, 0]
    assert vertices.max(0).tolist() == [2, 4, 6]
    corners = vertices[triangles]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outwards = corners.mean(1) - [1, 2, 3]
    assert len(triangles) == 12
    assert (np.sum(normals * outwards, axis=1) > 0).all()
    # Areas of all sides: 2 (2 4 + 4 6 + 6 2).
    assert np.linalg.norm(normals, axis=1).sum() / 2 == pytest.approx(88)


def test_no_rendering_device_is_told_before_the_simulator_is_imported(tree, monkeypatch):
    def none():
        raise graphics.GraphicsError("libvulkan.so.1 is not installed")

    monkeypatch.setattr(graphics, "vulkan", none)
    settings = simulator.Settings(str(tree))
    with pytest.raises(simulator.SimulatorError, match="no rendering device: libvulkan"):
        probe.look(settings, "widowx_stack_cube", "prepackaged")


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([{"name": "llvmpipe"}], "Vulkan devices: llvmpipe. SAPIEN takes GPUs"),
        (aside.AsideError("exit code 1: no driver works"), "no driver works.*lavapipe.sh gives"),
    ],
)
def test_a_simulator_that_dies_is_told_with_what_could_draw(tree, monkeypatch, devices, words):
    def ask(module, flags, timeout):
        if module.endswith("probe") or isinstance(devices, Exception):
            raise devices if module.endswith("graphics") else aside.AsideError("exit code -11: x")
        return devices

    monkeypatch.setattr(aside, "ask", ask)
    with pytest.raises(simulator.SimulatorError, match="exit code -11: x.*" + words):
        probe.probe(simulator.Settings(str(tree)), "widowx_stack_cube", "prepackaged")


def test_questions_aside(tmp_path):
    assert isinstance(aside.ask("json.tool", [str(_json(tmp_path, "{}"))], 20.0), dict)
    with pytest.raises(aside.AsideError, match=r"exit code 1: .*Expecting"):
        aside.ask("json.tool", [str(_json(tmp_path, "{"))], 20.0)
    with pytest.raises(aside.AsideError, match=r"no answer within 0\.01 s"):
        aside.ask("timeit", ["-n1", "import time; time.sleep(60)"], 0.01)
    assert aside.commit(str(tmp_path)) is None


def _json(folder, text):
    path = folder / "file.json"
    path.write_text(text)
    return path
