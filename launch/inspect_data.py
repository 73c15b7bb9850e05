"""Look at a dataset before training on it.

    python launch/inspect_data.py data/my_robot --write-spec=my_robot.py
    python launch/inspect_data.py data/my_robot --spec=my_robot.py:my_robot
    python launch/inspect_data.py bridge_dataset --root=~/data

Without a spec it lists what the dataset holds; --write-spec writes a first spec, to be used as it
is or edited. With one it prints shapes, the gripper's histogram, statistics and what is suspicious:
a gripper that is not binary, constant dimensions, wrong polarity, missing or odd texts, jumps of
the state, repeated episodes, a wrong control rate, and cameras that are frozen, black, doubled or
out of step with the robot. Writes a contact sheet of the cameras and a plot of the actions to OUT
(default runs/inspect/NAME); --report writes what is wrong as JSON, with the episodes' numbers.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import refusal
from vla_jax.commands import HelpFormatter, as_typed
from vla_jax.data.errors import DataError
from vla_jax.data.find_spec import find_spec, short_name
from vla_jax.data.first_spec import list_features, recorded_hz, source_code
from vla_jax.data.inspection import Findings, check_images, inspect, trajectories_shown
from vla_jax.data.oxe.folders import find_folder
from vla_jax.data.places import DataPath, data_path, is_remote
from vla_jax.data.quality.check import Quality, check, write_report
from vla_jax.shipped import install_hint

_TILE, _MARGIN, _LINE = 112, 4, 16  # pixels
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_SHOWN = 3  # trajectories in the plot


def contact_sheet(findings: Findings, images: dict[str, np.ndarray]) -> Image.Image:
    """Some frames of some trajectories, under what these are told; one block a camera."""
    dataset, font = findings.dataset, ImageFont.load_default()
    shown = trajectories_shown(dataset)
    columns = max(x.shape[1] for x in images.values())
    gap = 4 * _MARGIN
    block = columns * (_TILE + _MARGIN)
    row = _TILE + _LINE + _MARGIN
    size = (gap + len(images) * (block + gap), gap + _LINE + len(shown) * row)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for b, (camera, tiles) in enumerate(images.items()):
        left = gap + b * (block + gap)
        height, width = dataset.image_sizes[camera]
        draw.text((left, _MARGIN), f"{camera}, {height} x {width}", _INK, font)
        for r, trajectory in enumerate(shown):
            top = gap + _LINE + r * row
            code = int(dataset.text[dataset.text_starts[trajectory]])
            text = f"{trajectory}: {dataset.instructions[code]}"
            draw.text((left, top), _cut(text, block, font), _INK, font)
            for c, pixels in enumerate(tiles[r]):
                scale = _TILE / max(pixels.shape[:2])
                shape = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
                tile = Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS)
                sheet.paste(tile, (left + c * (_TILE + _MARGIN), top + _LINE))
    return sheet


def _cut(text: str, width: int, font: Any) -> str:
    text = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font can draw
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if font.getlength("…") else text[:-1]
        text = text.replace("……", "…")
    return text


def action_plot(findings: Findings, path: Path) -> None:
    """Every action dimension: its histogram, and its course in some trajectories.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dataset, columns = findings.dataset, findings.statistics["action"]
    dim = dataset.actions.shape[1]
    figure, axes = pyplot.subplots(
        dim, 2, figsize=(10, 1.3 * dim + 0.6), width_ratios=(1, 2), squeeze=False
    )
    # More curves than these could not be told apart.
    shown = trajectories_shown(dataset)[:_SHOWN]
    for i, (left, right) in enumerate(axes):
        left.hist(dataset.actions[:, i], bins=50, color="0.4")
        for name in ("q01", "q99"):
            left.axvline(columns[name][i], color="tab:red", linewidth=0.8)
        # Most actions are small; on a linear scale the rare ones would vanish.
        left.set_yscale("log")
        is_gripper = dataset.spec.has_gripper and i == dim - 1
        left.set_ylabel("gripper" if is_gripper else f"dim {i}")
        for trajectory in shown:
            rows = slice(*dataset.starts[trajectory : trajectory + 2])
            right.plot(dataset.actions[rows, i], linewidth=0.9, label=f"trajectory {trajectory}")
        for axis in (left, right):
            axis.tick_params(labelsize=7)
            axis.locator_params(axis="x", nbins=5)
        left.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes[0, 0].set_title("all frames (log scale); red: 1 % and 99 %", fontsize=9)
    axes[0, 1].set_title(f"{dataset.name}, in its own units, by frame", fontsize=9)
    axes[-1, 1].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    # Written beside and renamed: no viewer sees half a picture.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)


def report(findings: Findings, quality: Quality, more: list[str]) -> str:
    """The text that is printed."""
    lines = [f"{findings.dataset.name} in {findings.dataset.source.root}", *findings.summary]
    lines += quality.lines(len(findings.dataset.lengths))
    if findings.gripper:
        bars = " ".join(f"{fraction:4.0%}" for fraction in findings.gripper)
        lines.append(f"gripper, from 0 = closed to 1 = open in tenths: {bars}")
    else:
        lines.append("gripper: none (the spec has no gripper_env)")
    warnings = [*findings.warnings, *more, *(issue.line() for issue in quality.issues)]
    lines.append(f"{len(warnings)} warnings" + ":" * bool(warnings))
    return "\n".join([*lines, *(f"  - {warning}" for warning in warnings)])


def locate(data: str, root: str, spec: str) -> tuple[DataPath, str]:
    """The dataset's folder or URL and its spec's name.

    Raises:
        DataError: there is no such folder; KeyError: no such spec.
    """
    folder = data_path(data)
    if is_remote(folder) or folder.is_dir():
        # .../NAME/1.0.0 or .../NAME
        named = folder.absolute()
        version = named.name.replace(".", "").isdigit()
        return folder, spec or (named.parent.name if version else named.name)
    if not root:
        raise DataError(
            f"no folder {data!r}; a dataset of the registry takes --root beside its name"
        )
    # For its error alone: a name without a spec is reported before a missing folder.
    find_spec(spec or data)
    located = find_folder(root, data)
    if located is None:
        raise DataError(f"no folder {data!r}, and {root}/{data}/VERSION does not exist")
    return located, spec or data


def is_unknown(data: str) -> bool:
    """Whether the argument is a folder or URL that the registry has no spec for."""
    try:
        find_spec(locate(data, "", "")[1])
    except (DataError, KeyError):
        return is_remote(data_path(data)) or data_path(data).is_dir()
    return False


def describe(data: str) -> list[str]:
    """What a dataset without a spec holds, and how to go on."""
    return [
        f"{data}: no spec says what its numbers mean. It holds:",
        *list_features(data),
        as_typed("A first spec: python launch/inspect_data.py")
        + f" {data} --write-spec=my_robot.py",
    ]


def write_spec(path: Path, data: str) -> str:
    """Writes a first spec to a new file; returns what to print.

    Raises:
        DataError: the file exists, its name cannot be a spec's, or see `first_spec.guess`.
    """
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise DataError("--write-spec: name it NAME.py; the spec gets the name, so letters first")
    if path.exists():
        raise DataError(f"--write-spec: {path} exists; remove it, or choose another name")
    path.write_text(source_code(path.stem, data), encoding="utf-8")
    named = f"{path}:{path.stem}"
    return "\n".join(
        [
            *list_features(data),
            f"wrote {path}; check what it takes for the action, the state and the cameras, then",
            as_typed("  python launch/inspect_data.py") + f" {data} --spec={named}",
            as_typed("  python launch/train.py")
            + f" --config=configs/first_run.py:{named}:{data} --workdir=runs/{path.stem}",
        ]
    )


def main() -> None:
    """Parse flags, inspect, print, write the pictures."""
    refusal.quiet_interrupt()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data", help="folder or URL of a dataset, or, with --root, a name")
    parser.add_argument("--spec", default="", help="of the registry, or FILE.py:NAME")
    parser.add_argument(
        "--write-spec", type=Path, metavar="FILE.py", help="write a first spec, FILE.py:FILE"
    )
    parser.add_argument("--variant", default="default", help="see data.parity.variant")
    parser.add_argument("--root", default="", help="holds NAME/VERSION of the registry's datasets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, help="default: runs/inspect/NAME")
    parser.add_argument("--cache", default="", help="where its index lives; default: beside it")
    refusal.add_flag(parser)
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json", help="also write what is wrong, for machines"
    )
    flags = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        run(flags)
    except refusal.CAUSED as error:
        sys.exit(refusal.tell(error, flags.debug))


def run(flags: argparse.Namespace) -> None:
    """What the flags ask for."""
    if flags.write_spec:
        print(write_spec(flags.write_spec, flags.data))
        return
    if not flags.spec and not flags.root and is_unknown(flags.data):
        print("\n".join(describe(flags.data)))
        return
    folder, named = locate(flags.data, flags.root, flags.spec)
    name = short_name(named)
    findings = inspect(name, find_spec(named, flags.variant), folder, flags.split, flags.cache)
    images, more = check_images(findings.dataset)
    quality = check(findings.dataset, recorded_hz(folder))
    print(report(findings, quality, more))
    if flags.report:
        write_report(flags.report, findings.dataset, quality, [*findings.warnings, *more])
        print(f"wrote {flags.report}")
    out = flags.out or Path("runs/inspect") / name
    with refusal.naming("--out"):
        out.mkdir(parents=True, exist_ok=True)
    if images:
        temporary = out / f".{os.getpid()}.png"
        contact_sheet(findings, images).save(temporary)
        os.replace(temporary, out / "cameras.png")
        print(f"wrote {out / 'cameras.png'}")
    try:
        action_plot(findings, out / "actions.png")
        print(f"wrote {out / 'actions.png'}")
    except ImportError:
        print(f"no plot of the actions, which needs matplotlib: {install_hint('demo')}")


if __name__ == "__main__":
    main()
