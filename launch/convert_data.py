"""Convert a dataset into RLDS, the format that trains fastest.

    python launch/convert_data.py calvin task_ABC_D data/calvin_abc/1.0.0
    python launch/convert_data.py calvin task_ABC_D data/calvin_abc_play/1.0.0 --episodes=segments
    python launch/convert_data.py calvin task_D_D data/calvin_d/1.0.0 --depth
    python launch/convert_data.py lerobot ~/lerobot/pusht data/pusht/1.0.0
    python launch/convert_data.py libero RECORDED data/libero_object_no_noops/1.0.0
    python launch/convert_data.py libero RECORDED data/libero_object --to=lerobot

CALVIN and LeRobot folders can also be named in `data.datasets[].dir` as they are; converting makes
reading images several times cheaper. OUT is the version folder `data.datasets[].dir` will name;
plain TFDS reads it too (`tfds.builder_from_directory(OUT)`). It appears when all is written. Images
that are encoded already are kept byte for byte; pixels become JPEG (quality 95, 4:4:4) or PNG.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import refusal
from vla_jax.commands import HelpFormatter
from vla_jax.data import recordings
from vla_jax.data.calvin import source as calvin
from vla_jax.data.errors import DataError
from vla_jax.data.lerobot import source as lerobot
from vla_jax.data.rlds.convert import write_rlds
from vla_jax.data.source import Source


def open_sources(
    kind: str, folder: Path, episodes: str, cache_dir: str, depth: bool = False
) -> dict[str, Source]:
    """Every split of a CALVIN or LeRobot dataset, with all that can be written.

    Raises:
        DataError: the folder does not hold such data.
    """
    splits = {"calvin": calvin, "lerobot": lerobot}[kind].split_names(folder)
    if not splits:
        raise DataError("no training/ or validation/ with ep_start_end_ids.npy", folder)
    if kind == "lerobot":
        columns = lerobot.features(folder)
        # Pictures are read one by one later; the rest is small enough to be opened whole.
        low = [path for path, f in columns.items() if f.kind in ("tensor", "text")]
        return {split: lerobot.open_lerobot(folder, split, low, cache_dir) for split in splits}
    low = list(calvin.features(folder, depth))
    mode: calvin.Mode = "segments" if episodes == "segments" else "windows"
    return {
        split: calvin.open_calvin(folder, split, low, cache_dir, mode=mode, depth=depth)
        for split in splits
    }


def main() -> None:
    """Parse flags and convert."""
    refusal.quiet_interrupt()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("kind", choices=("calvin", "lerobot", "libero"))
    parser.add_argument("src", type=Path, help="folder of the dataset")
    parser.add_argument("out", type=Path, help="version folder to make, e.g. data/my_robot/1.0.0")
    parser.add_argument(
        "--episodes",
        choices=("windows", "segments"),
        default="windows",
        help="calvin: one episode for every annotation, or all recordings, annotated or not, in "
        "pieces of up to 512 frames (default: %(default)s)",
    )
    parser.add_argument(
        "--depth",
        action="store_true",
        help="calvin: also the depth images, in m, as zlib-compressed float32 tensors",
    )
    parser.add_argument(
        "--to",
        choices=("rlds", "lerobot"),
        default="rlds",
        help="libero: what to write (default: %(default)s); lerobot is v3.0",
    )
    parser.add_argument("--images", choices=("jpeg", "png"), default="jpeg", help="for pixels")
    parser.add_argument("--name", help="of the dataset; default: the folder above OUT")
    parser.add_argument(
        "--cache", default="", help="where copied numbers live; default: beside SRC"
    )
    refusal.add_flag(parser)
    flags = parser.parse_args()
    if flags.depth and flags.kind != "calvin":
        parser.error("--depth is for calvin; of others all is converted")
    if flags.to != "rlds" and flags.kind != "libero":
        parser.error("--to is for libero; others become RLDS")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # OUT is a version folder, so its parent has the dataset's name; TFDS wants small letters.
    name = flags.name or re.sub(r"\W+", "_", flags.out.absolute().parent.name.lower())
    description = f"Converted from {flags.kind} by vla_jax."
    try:
        folder = flags.src.expanduser()
        if not folder.is_dir():
            raise DataError("no such folder", folder)
        if flags.kind == "libero":
            if flags.to == "lerobot":
                counts = recordings.write_lerobot(folder, flags.out)
            else:
                counts = recordings.write_rlds(folder, flags.out, name)
            print(f"{flags.out}: {counts} episodes")
            return
        sources = open_sources(flags.kind, folder, flags.episodes, flags.cache, flags.depth)
        counts = write_rlds(sources, flags.out, name, flags.images, description)
    except refusal.CAUSED as error:
        sys.exit(refusal.tell(error, flags.debug))
    # Trajectories lie one behind the other, so the last start is the number of frames.
    frames = sum(int(source.starts[-1]) for source in sources.values())
    print(f"{flags.out}: {counts} episodes, {frames} frames")


if __name__ == "__main__":
    main()
