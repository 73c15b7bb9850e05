"""Pictures of the table: flat-shaded polygons drawn far to near, from two cameras.

"static" looks steeply down over the front edge, so that table x, y map almost linearly to image
columns and rows. "gripper" sits in front of the fingers, moves and turns with the tool and sees
what is between them. Everything is drawn at twice the size and averaged down.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval_servers.tabletop import layout

SUPERSAMPLE = 2
SKY = (70, 78, 92)
PAINT = {
    "table": (214, 196, 164),
    "rim": (150, 122, 90),
    "ledge": (176, 160, 136),
    "left": (250, 232, 120),
    "right": (178, 138, 214),
    "red": (228, 42, 36),
    "green": (36, 176, 66),
    "blue": (36, 84, 230),
    "rail": (70, 70, 76),
    "knob": (255, 150, 20),
    "base": (96, 98, 104),
    "cap": (20, 190, 200),
    "led_off": (62, 54, 48),
    "led_on": (255, 248, 90),
    "finger": (44, 46, 54),
    "palm": (112, 118, 130),
}
SUN = np.array([-0.35, -0.45, 0.82])
AMBIENT = 0.48  # share of a face's color that needs no sun
SHADOW = (30, 24, 20, 90)  # RGBA
NEAR = 0.02  # meters in front of a camera where it begins to see

# A box has 8 corners; bit 0, 1, 2 of the corner's number choose the high end of x, y, z.
_CORNERS = np.array([[2.0 * (n >> k & 1) - 1 for k in range(3)] for n in range(8)])
# Its faces but the bottom, as corners in order round the face, with their normals.
_FACES = np.array([[4, 5, 7, 6], [0, 1, 5, 4], [2, 3, 7, 6], [0, 2, 6, 4], [1, 3, 7, 5]])
_NORMALS = np.array([[0, 0, 1], [0, -1, 0], [0, 1, 0], [-1, 0, 0], [1, 0, 0]], dtype=float)


def _camera(eye, target, forward, focal):
    """Camera as (eye [3], rows right/down/depth [3, 3], focal in image widths).

    `forward` is the horizontal direction that is up in the picture.
    """
    eye = np.asarray(eye, dtype=float)
    depth = np.asarray(target, dtype=float) - eye
    depth /= np.linalg.norm(depth)
    # The small third part keeps the product defined for a camera that looks along `forward`.
    right = np.cross(depth, (forward[0], forward[1], 1e-3))
    right /= np.linalg.norm(right)
    return eye, np.stack([right, np.cross(depth, right), depth]), focal


STATIC = _camera((0.0, -0.66, 1.66), (0.0, 0.015, 0.02), (0.0, 1.0), 2.27)


def _gripper_camera(tool, yaw):
    c, s = np.cos(yaw), np.sin(yaw)
    ahead = np.array([-s, c])
    eye = np.append(tool[:2] - 0.10 * ahead, tool[2] + 0.17)
    target = np.append(tool[:2] + 0.02 * ahead, tool[2] - 0.03)
    return _camera(eye, target, ahead, 0.62)


def _rectangle(x, y, half_x, half_y, z=0.0):
    signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return np.column_stack([(x, y) + signs * (half_x, half_y), np.full(4, z)])


def _flats():
    """List what is painted on the table, in drawing order: (corners [4, 3], color)."""
    hx, hy = layout.TABLE_HALF
    ledge = (
        (hy + layout.BLOCK_HIGH[1] + layout.BLOCK_HALF) / 2,
        (hy - layout.BLOCK_HIGH[1] - layout.BLOCK_HALF) / 2,
    )
    rail = (
        (layout.RAIL_LEFT + layout.RAIL_RIGHT) / 2,
        (layout.RAIL_RIGHT - layout.RAIL_LEFT) / 2 + 0.02,
    )
    return [
        (_rectangle(0, 0, hx + 0.015, hy + 0.015), PAINT["rim"]),
        (_rectangle(0, 0, hx, hy), PAINT["table"]),
        (_rectangle(0, ledge[0], hx, ledge[1]), PAINT["ledge"]),
        *(
            (_rectangle(*layout.PADS[side], layout.PAD_HALF, layout.PAD_HALF), PAINT[side])
            for side in layout.SIDES
        ),
        (_rectangle(rail[0], layout.RAIL_Y, rail[1], 0.008), PAINT["rail"]),
        (
            _rectangle(*layout.BUTTON, layout.BUTTON_HALF + 0.012, layout.BUTTON_HALF + 0.012),
            PAINT["base"],
        ),
        (_rectangle(*layout.LED, layout.LED_HALF + 0.012, layout.LED_HALF + 0.012), PAINT["base"]),
    ]


_FLAT_PAINT = [colour for _, colour in _flats()]
_FLAT_CORNERS = np.stack([corners for corners, _ in _flats()])


def _boxes(info, with_palm):
    """Centers [n, 3], half sizes [n, 3], yaws [n], colors [n, 3] and glow [n] of the solids."""
    scene, robot = info["scene_info"], info["robot_info"]
    tool, yaw = np.asarray(robot["tcp_pos"]), robot["tcp_orn"][2]
    # Half the height of the cap, which sinks as it is pressed.
    cap = (layout.BUTTON_TOP - scene["button"]) / 2
    knob = layout.RAIL_LEFT + scene["slider"] * (layout.RAIL_RIGHT - layout.RAIL_LEFT)
    rows: list[tuple] = [
        ((*layout.BUTTON, cap), (layout.BUTTON_HALF, layout.BUTTON_HALF, cap), 0.0, "cap"),
        (
            (*layout.LED, layout.LED_TOP / 2),
            (layout.LED_HALF, layout.LED_HALF, layout.LED_TOP / 2),
            0.0,
            "led_on" if scene["led"] else "led_off",
        ),
        (
            (knob, layout.RAIL_Y, layout.KNOB_TOP / 2),
            (*layout.KNOB_HALF, layout.KNOB_TOP / 2),
            0.0,
            "knob",
        ),
    ]
    for colour, block in scene["blocks"].items():
        rows.append((block["pos"], (layout.BLOCK_HALF,) * 3, block["yaw"], colour))
    reach = robot["gripper_opening_width"] / 2 + layout.FINGER_HALF[0]
    across = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    middle = tool + (0.0, 0.0, layout.FINGER_HALF[2])
    for sign in (-1, 1):
        rows.append((middle + sign * reach * across, layout.FINGER_HALF, yaw, "finger"))
    # The gripper's own view is without the palm, which would stand in it.
    if with_palm:
        palm = tool + (0.0, 0.0, 2 * layout.FINGER_HALF[2] + 0.01)
        rows.append((palm, (0.08, 0.012, 0.010), yaw, "palm"))
        rows.append((palm + (0.0, 0.0, 0.03), (0.018, 0.018, 0.02), yaw, "palm"))
    glow = np.array([row[3] == "led_on" for row in rows])
    centres, halves, yaws = (np.array([row[k] for row in rows], dtype=float) for k in range(3))
    return centres, halves, yaws, np.array([PAINT[row[3]] for row in rows], dtype=float), glow


def _shadows(info):
    """Outlines [n, 4, 3] on the table straight below the tool and a block in the air."""
    robot = info["robot_info"]
    half = layout.BLOCK_HALF
    reach = robot["gripper_opening_width"] / 2 + 2 * layout.FINGER_HALF[0]
    outlines = [_turned(robot["tcp_pos"], reach, 0.010, robot["tcp_orn"][2])]
    for block in info["scene_info"]["blocks"].values():
        # A block on the table covers its own shadow.
        if block["pos"][2] > half + 1e-3:
            outlines.append(_turned(block["pos"], half, half, block["yaw"]))
    return np.stack(outlines)


def _turned(centre, half_x, half_y, yaw):
    corners = _rectangle(0, 0, half_x, half_y)
    c, s = np.cos(yaw), np.sin(yaw)
    return corners @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + (centre[0], centre[1], 0)


def _project(points, camera):
    """World points [..., 3] -> picture coordinates and depth [..., 3], before scaling."""
    eye, rows, _ = camera
    return (points - eye) @ rows.T


def _clip_near(polygon):
    """Cut a polygon [n, 3] in camera coordinates at the near plane."""
    if (polygon[:, 2] >= NEAR).all():
        return polygon
    clipped = []
    for k, b in enumerate(np.roll(polygon, -1, axis=0)):
        a = polygon[k]
        if a[2] >= NEAR:
            clipped.append(a)
        # The edge crosses the near plane: the polygon gets a corner there.
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            clipped.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(clipped).reshape(-1, 3)


def _draw_flats(draw, corners, colours, camera, size):
    """Draw polygons, corners [n, 4, 3] in the world, in the order given."""
    points = _project(corners, camera)
    in_front = (points[..., 2] >= NEAR).all(axis=1).tolist()
    pixels = _pixels(points, camera, size).reshape(len(points), -1).tolist()
    for k, colour in enumerate(colours):
        outline = pixels[k]
        if not in_front[k]:
            outline = _pixels(_clip_near(points[k]), camera, size).ravel().tolist()
        # Three corners, x and y each; fewer is nothing to fill.
        if len(outline) >= 6:
            draw.polygon(outline, fill=colour)


def _pixels(points, camera, size):
    """Camera coordinates [..., 3] -> pixels [..., 2]; what is too near is drawn at `NEAR`."""
    return size / 2 + camera[2] * size * points[..., :2] / np.maximum(points[..., 2:], NEAR)


def _draw_table(camera, size):
    image = Image.new("RGB", (size, size), SKY)
    draw = ImageDraw.Draw(image)
    _draw_flats(draw, _FLAT_CORNERS, _FLAT_PAINT, camera, size)
    return image


@lru_cache(maxsize=8)
def _static_table(size):
    """The empty table seen by the static camera, which never changes."""
    return _draw_table(STATIC, size)


def _draw_boxes(draw, boxes, camera, size):
    centres, halves, yaws, colours, glow = boxes
    c, s = np.cos(yaws), np.sin(yaws)
    zeros, ones = np.zeros_like(c), np.ones_like(c)
    turn = np.stack([c, -s, zeros, s, c, zeros, zeros, zeros, ones], axis=1).reshape(-1, 3, 3)
    corners = (_CORNERS * halves[:, None]) @ turn.transpose(0, 2, 1) + centres[:, None]
    normals = _NORMALS @ turn.transpose(0, 2, 1)
    faces = corners[:, _FACES]
    # Boxes are convex, so faces turned away are hidden by their own box.
    facing = ((camera[0] - faces[:, :, 0]) * normals).sum(-1) > 0
    light = AMBIENT + (1 - AMBIENT) * np.clip(normals @ SUN, 0.0, None)
    # Divided by the light on an upward face, which so shows its paint unchanged.
    light = np.where(glow[:, None], 1.0, light / (AMBIENT + (1 - AMBIENT) * SUN[2]))
    shades = np.clip(colours[:, None] * light[..., None], 0, 255).astype(int).tolist()
    points = _project(corners, camera)
    shown = (facing & (points[..., 2] > NEAR).all(axis=1)[:, None]).tolist()
    outlines = (
        _pixels(points, camera, size)[:, _FACES].reshape(len(centres), len(_FACES), -1).tolist()
    )
    distance = np.linalg.norm(centres - camera[0], axis=1)
    # Painter's algorithm; stable, so that equal distances give the same pixels everywhere.
    for i in np.argsort(-distance, kind="stable").tolist():
        for k in range(len(_FACES)):
            if shown[i][k]:
                draw.polygon(outlines[i][k], fill=tuple(shades[i][k]))


def render(info: dict[str, Any], camera: str, size: int) -> np.ndarray:
    """Draw the scene of an info.

    Args:
        info: what `World.get_info` returns.
        camera: "static" or "gripper".
        size: height = width in pixels.

    Returns:
        uint8 [size, size, 3], RGB.

    Raises:
        ValueError: if there is no such camera.
    """
    fine = size * SUPERSAMPLE
    if camera == "static":
        # A copy, since the cached picture is drawn on below.
        view, image = STATIC, _static_table(fine).copy()
    elif camera == "gripper":
        robot = info["robot_info"]
        view = _gripper_camera(np.asarray(robot["tcp_pos"]), robot["tcp_orn"][2])
        image = _draw_table(view, fine)
    else:
        raise ValueError(f"no camera {camera!r}; cameras: 'static', 'gripper'")
    # This mode blends the half-transparent shadows with what is under them.
    blend = ImageDraw.Draw(image, "RGBA")
    shadows = _shadows(info)
    _draw_flats(blend, shadows, [SHADOW] * len(shadows), view, fine)
    _draw_boxes(ImageDraw.Draw(image), _boxes(info, camera == "static"), view, fine)
    return np.asarray(image.reduce(SUPERSAMPLE))
