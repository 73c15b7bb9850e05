"""How far a stranger walks: from the jitted step to an attention layer, and from file to file.

    python bench/walk.py

One batch of a tiny `kosmos_ph` (Kosmos-2, policy head, LSTM) is loaded and the program of its train
step is traced once, without a device's work. What counts is what Python runs in `vla_jax/`:

* depth: functions of ours on the stack, from the jitted `step` to the `__call__` of an `Attention`,
  both counted. Frames of jax and flax between them are not.
* files: those a batch passes through. On the way are the files of ours on the stack wherever one of
  `STATIONS` is reached, from a sample's number to the loss: what a stranger opens who follows the
  batch by its calls. All files in which anything runs meanwhile are listed beside them.
"""

import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax.config import Config, resolve
from vla_jax.configs import tiny
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.loader import Loader
from vla_jax.data.mixture import open_datasets
from vla_jax.models import vla
from vla_jax.plan.programs import train_program

ROOT = Path(__file__).resolve().parents[1]
OURS = str(ROOT / "vla_jax") + "/"
DATA = ROOT / "tests/fixtures/bridge_dataset/1.0.0"
STEP, ATTENTION = "make_train_step.<locals>.step", "Attention.__call__"
TOWER = "VisionTransformer.__call__"
LAYER = (ATTENTION, "Block.__call__", "layer", "Stack.turn.<locals>.turn")
# Where a batch is made or changed: its order, numbers, pixels, input, tokens, features and loss.
STATIONS = (
    "MixtureOrder.__call__", "chunks", "Prepared.numbers", "decode_into",
    "augment", "preprocess", TOWER, ATTENTION, "LSTMHead.__call__",
    "action_loss",
)  # fmt: skip


class Watch:
    """Python's calls of ours while it is on, in every thread.

    Attributes:
        depths: who stacks the layers -> functions on the deepest way to attention, step first.
        first: files on the stack at the stations up to the image tower, the first matrix product.
        way: files on the stack at all stations.
        seen: stations that were reached.
        files: all files in which a function ran.
    """

    def __init__(self):
        self.depths: dict[str, list[str]] = {}
        self.first: set[str] = set()
        self.way: set[str] = set()
        self.seen: set[str] = set()
        self.files: set[str] = set()

    def __enter__(self) -> "Watch":
        threading.setprofile(self._call)
        sys.setprofile(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(OURS):
            return
        self.files.add(_file(frame))
        name = frame.f_code.co_qualname
        if name not in STATIONS:
            return
        stack = _ours(frame)
        self.seen.add(name)
        self.way.update(_file(entry) for entry in stack)
        if name == TOWER and not self.first:
            self.first = set(self.way)
        names = [entry.f_code.co_qualname for entry in stack]
        starts = [i for i, called in enumerate(names) if called == STEP]
        if name == ATTENTION and starts:
            way = names[starts[0] :]
            tower = [called for called in way if called not in LAYER][-1]
            self.depths[tower] = max(self.depths.get(tower, []), way, key=len)


def walk(folder: Path) -> Watch:
    """Loads one batch and traces one step.

    Args:
        folder: for the dataset's index.
    """
    config, watch = tiny_config(folder), Watch()
    mixture = open_datasets(config.data, config.model.structure, config.model.action_dim, "train")
    words = [vla.prompt(config.model).format(instruction=text) for text in mixture.instructions]
    write = Writer(
        Tokenizer.build(words, vla.build(config.model).word_ids),
        config.model.structure.text_len,
        vla.prompt(config.model),
        vla.prompt_form(config.model),
    )
    program = train_program(config, jax.devices()[:1])
    with watch, Loader(mixture, write, config.train.batch_size, seed=0) as loader:
        next(loader)
        program.step.trace(program.template, program.batch)
    return watch


def tiny_config(folder: Path) -> Config:
    """`kosmos_ph` with a VLM of one layer, on four trajectories of Bridge."""
    raw = tiny.get_config("kosmos2")
    raw.model.structure.update({"cameras": ("primary",), "window": 3, "chunk": 2, "text_len": 32})
    raw.model.backbone.arch["text_config"]["vocab_size"] = 400
    raw.data.datasets = ({"spec": "bridge_dataset", "dir": str(DATA), "weight": 1.0},)
    raw.data.update({"cache_dir": str(folder), "val_fraction": 0.25, "val_split": ""})
    raw.data.update({"normalization": "q99"})
    raw.train.batch_size = 2
    return resolve(raw)


def _ours(frame: FrameType | None) -> list[FrameType]:
    """Frames of ours from the outermost to this one."""
    frames = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename[len(OURS) :]


def main() -> None:
    """Walk once and print both counts."""
    with tempfile.TemporaryDirectory() as folder:
        watch = walk(Path(folder))
    for tower, way in watch.depths.items():
        print(f"depth from step to attention in {tower}: {len(way)}")
        print("  " + " > ".join(name.rpartition("<locals>.")[2] for name in way))
    print(f"files on the way of a batch to the first matrix product: {len(watch.first)}")
    print("  " + ", ".join(sorted(watch.first)))
    print(f"and to the loss: {len(watch.way)}, of {len(watch.files)} in which anything runs")
    print("  " + ", ".join(sorted(watch.way - watch.first)))
    print("  beside it: " + ", ".join(sorted(watch.files - watch.way)))


if __name__ == "__main__":
    main()
