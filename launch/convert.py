"""Convert weights of Hugging Face, RoboVLMs, openpi, LeRobot and OpenVLA, both ways, to the bit.

    python launch/convert.py import-hf models/kosmos-2 runs/kosmos2
    python launch/convert.py import-robovlms kosmos.pt kosmos.json runs/kosmos --vlm=models/kosmos-2
    python launch/convert.py import-openpi pi05_libero runs/pi05 --config=pi05_libero
    python launch/convert.py import-lerobot smolvla_base runs/smolvla --config=smolvla
    python launch/convert.py import-openvla openvla-7b-oft runs/oft --config=openvla_oft_libero
    python launch/convert.py export-hf runs/kosmos_ph exported
    python launch/convert.py export-robovlms runs/kosmos_ph kosmos_ph.pt
    python launch/convert.py export-openpi runs/pi05 exported
    python launch/convert.py push runs/kosmos_ph exported --repo=USER/NAME

An import writes a workdir as launch/train.py does, an export reads one. Every name and shape is
checked first, with one report of all that is missing, unexpected, of the wrong shape or type, or a
copy that differs from its original; then tensors stream one at a time, so that a 6.8 GB model
takes less than 4 GB of memory. Nothing is half-written: the output appears when it is whole. No
command needs PyTorch, and .pt files are read without running what is pickled in them.
An export has a model card beside it. COMMAND --help says more.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import refusal
from vla_jax.commands import HelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Parse flags, convert, print a summary; returns the exit status."""
    refusal.quiet_interrupt()
    flags = _parse_flags(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every phase of every save
    logging.getLogger("jax").setLevel(logging.WARNING)  # and jax every device that is not here
    from vla_jax.convert import output  # after the flags: --help need not wait for jax

    watch = output.Stopwatch()
    try:
        output.check_free(flags.out, flags.overwrite)  # before the work, not after
        refusal.check_devices()
        flags.command(flags)
    except refusal.CAUSED as error:
        return refusal.tell(error, flags.debug)
    print(watch)
    return 0


def import_hf(flags: argparse.Namespace) -> None:
    """Hugging Face folder (also one that export-hf wrote) -> workdir."""
    from vla_jax.convert import importing
    from vla_jax.convert.default_config import default_config

    refusal.check_paths(flags, positional=("src",))
    # None stands for the settings that an earlier export left beside the weights.
    raw = None
    if flags.config or flags.set or not (Path(flags.src) / importing.SETTINGS).is_file():
        where = flags.config or default_config(flags.src)
        logging.info("config: %s (--config chooses another)", where)
        raw = _config(where, flags)
    _save(importing.from_hf(flags.src, raw, _dtype(flags)), flags)


def import_robovlms(flags: argparse.Namespace) -> None:
    """RoboVLMs checkpoint and config -> workdir."""
    from vla_jax.config import ConfigError, read_json
    from vla_jax.convert import importing

    refusal.check_paths(flags, "vlm", "statistics", positional=("ckpt", "config_json"))
    # Their config decides the model; ours says all that theirs has no word for.
    original = read_json(flags.config_json)
    base = _config("base", flags)
    units, vlm, dtype = flags.statistics, flags.vlm, _dtype(flags)
    try:
        imported = importing.from_robovlms(flags.ckpt, original, base, vlm, units, dtype)
    except ConfigError as error:
        raise ConfigError(f"{flags.config_json}: {error}") from error
    _save(imported, flags)


def import_openpi(flags: argparse.Namespace) -> None:
    """Folder of openpi's or LeRobot's pi0 or pi0.5 (params/ or model.safetensors) -> workdir."""
    from vla_jax.convert.openpi.importing import from_openpi

    refusal.check_paths(flags, "tokenizer", positional=("src",))
    raw = _config(flags.config, flags)
    _save(from_openpi(flags.src, raw, flags.tokenizer, flags.asset, _dtype(flags)), flags)


def import_lerobot(flags: argparse.Namespace) -> None:
    """Folder of LeRobot's SmolVLA -> workdir. Its pi0 and pi0.5: import-openpi."""
    from vla_jax.convert.lerobot.importing import from_lerobot

    refusal.check_paths(flags, "tokenizer", "statistics", positional=("src",))
    raw = _config(flags.config, flags)
    imported = from_lerobot(flags.src, raw, flags.tokenizer, flags.statistics, _dtype(flags))
    _save(imported, flags)


def import_openvla(flags: argparse.Namespace) -> None:
    """Folder of OpenVLA or OpenVLA-OFT, its parts and its adapter -> workdir."""
    from vla_jax.convert.openvla.importing import from_openvla

    refusal.check_paths(flags, "base", positional=("src",))
    raw = _config(flags.config, flags)
    _save(from_openvla(flags.src, raw, flags.base, _dtype(flags)), flags)


def export_openvla(flags: argparse.Namespace) -> None:
    """Workdir of an OpenVLA or OpenVLA-OFT -> folder for their own code."""
    from vla_jax.convert import store
    from vla_jax.convert.openvla.exporting import to_openvla

    stored = store.Stored(flags.ckpt, flags.step)
    # In bytes of 10^9, as Hugging Face counts the size of a shard.
    limit = round(flags.max_shard_gb * 1e9)
    with _bar(stored.leaves) as bar:
        exported = to_openvla(stored, flags.out, limit, _dtype(flags), flags.overwrite, bar.update)
    _summary(stored.leaves, exported.changed, flags.out)


def export_lerobot(flags: argparse.Namespace) -> None:
    """Workdir of a SmolVLA, pi0 or pi0.5 -> folder that LeRobot loads, processors included."""
    from vla_jax.convert import store
    from vla_jax.convert.lerobot.exporting import to_lerobot

    stored = store.Stored(flags.ckpt, flags.step)
    with _bar(stored.leaves) as bar:
        exported = to_lerobot(
            stored, flags.out, _dtype(flags), flags.overwrite, bar.update, flags.vlm
        )
    _summary(stored.leaves, exported.changed, flags.out)


def export_openpi(flags: argparse.Namespace) -> None:
    """Workdir -> folder for openpi: params/ (JAX) or model.safetensors (torch), and assets/."""
    from vla_jax.convert import store
    from vla_jax.convert.openpi.exporting import to_openpi

    stored = store.Stored(flags.ckpt, flags.step)
    with _bar(stored.leaves) as bar:
        exported = to_openpi(
            stored, flags.out, flags.format, _dtype(flags), flags.overwrite, bar.update
        )
    _summary(stored.leaves, exported.changed, flags.out)


def export_hf(flags: argparse.Namespace) -> None:
    """Workdir -> Hugging Face folder, for transformers and for import-hf."""
    from vla_jax.convert import exporting, store

    refusal.check_paths(flags, "source")
    stored = store.Stored(flags.ckpt, flags.step)
    with _bar(stored.leaves) as bar:
        exported = exporting.to_hf(
            stored,
            flags.out,
            source=flags.source,
            limit=round(flags.max_shard_gb * 1e9),
            dtype=_dtype(flags),
            adapter=flags.lora == "adapter",
            overwrite=flags.overwrite,
            done=bar.update,
        )
    _summary(stored.leaves, exported.changed, flags.out)


def export_robovlms(flags: argparse.Namespace) -> None:
    """Workdir -> one file in RoboVLMs' layout."""
    from vla_jax.convert import exporting, store

    stored = store.Stored(flags.ckpt, flags.step)
    with _bar(stored.leaves) as bar:
        exported = exporting.to_robovlms(
            stored, flags.out, flags.bare, _dtype(flags), flags.overwrite, bar.update
        )
    _summary(stored.leaves, exported.changed, flags.out)


def push(flags: argparse.Namespace) -> None:
    """Workdir -> folder for a model hub, with a model card; sent there if --repo is named."""
    from vla_jax.convert.push import upload, write_checkpoint

    if flags.layout == "checkpoint":
        from vla_jax.convert import store

        stored = store.Stored(flags.ckpt, flags.step)
        with _bar(stored.leaves) as bar:
            write_checkpoint(stored, flags.out, _dtype(flags), flags.overwrite, bar.update)
        _summary(stored.leaves, (), flags.out)
    else:
        # These write the model card as well, so that a hub's folder is whole either way.
        {"hf": export_hf, "openpi": export_openpi, "lerobot": export_lerobot}[flags.layout](flags)
    if flags.repo:
        print(f"sent to {upload(flags.out, flags.repo, private=not flags.public)}")
    else:
        print(f"ready: read {flags.out}/README.md, then hf upload USER/NAME {flags.out} .")


def _config(where: str, flags: argparse.Namespace) -> Any:
    from vla_jax.config import load_config_file

    with refusal.naming("--config"):
        raw = load_config_file(where)
    # Apart, as what is wrong with a --set is no fault of the file's.
    return load_config_file(where, flags.set) if flags.set else raw


def _save(imported: Any, flags: argparse.Namespace) -> None:
    # All names and shapes were checked while `imported` was made; no tensor was read as yet.
    if not flags.check:
        with _bar(imported.leaves) as bar:
            imported.save(flags.out, flags.overwrite, lambda leaf: bar.update(leaf.nbytes))
    where = "nowhere: all of it fits" if flags.check else flags.out
    _summary(imported.leaves, imported.changed, where)
    model = imported.config.model
    print(f"model: {model.backbone.name} / {model.structure.kind} / {model.head.kind}")
    if imported.fresh:
        print(f"not in the source, random (seed {imported.config.seed}): {_few(imported.fresh)}")
    if imported.unused:
        print(f"passed over, they carry nothing: {_few(imported.unused)}")


def _summary(leaves: Mapping[str, Any], changed: Sequence[str], where: str) -> None:
    print(f"{sum(leaf.size for leaf in leaves.values()):,} parameters -> {where}")
    print(f"types: {len(changed)} changed: {_few(changed)}" if changed else "types: all kept")


def _few(lines: Sequence[str]) -> str:
    return "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")


def _bar(leaves: Mapping[str, Any]) -> Any:
    from vla_jax import progress

    total = sum(leaf.nbytes for leaf in leaves.values())
    return progress.bar(total=total, unit="B", unit_scale=True)


def _dtype(flags: argparse.Namespace) -> np.dtype | None:
    import jax.numpy as jnp

    # Through jax, as numpy by itself knows no bfloat16.
    return None if flags.dtype == "keep" else np.dtype(jnp.dtype(flags.dtype))


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # Each command's help is its function's docstring, so that the two cannot differ.
    def command(function: Any, name: str, importer: bool, arguments: Mapping[str, str]) -> Any:
        text = function.__doc__
        sub = commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        add = sub.add_argument
        for argument, meaning in arguments.items():
            add(argument.lower().replace(".", "_"), metavar=argument, help=meaning)
        # What all of them take, so that one habit does for every format.
        add("--overwrite", action="store_true", help="replace OUT if it exists")
        add("--dtype", default="keep", choices=("keep", "float32", "bfloat16", "float16"),
            help="store every parameter in this type (default: keep each one's)")  # fmt: skip
        if importer:
            add("--check", action="store_true", help="only report whether everything fits")
            add("--set", action="append", default=[], metavar="KEY=VALUE",
                help="change the config: --set=data.clip=0.65 (repeatable)")  # fmt: skip
        else:
            add("--step", type=int, metavar="N", help="checkpoint of this step (default: newest)")
        refusal.add_flag(sub)
        sub.set_defaults(command=function)
        return add

    workdir = {"OUT": "new workdir, for launch/serve.py and launch/train.py"}
    source = {"SRC": "folder with config.json, *.safetensors and tokenizer"}
    add = command(import_hf, "import-hf", True, source | workdir)
    add(
        "--config",
        metavar="FILE[:ARG]",
        help="our config (default: SRC's own, or its backbone's DEFAULT_CONFIG)",
    )
    source = {"CKPT": "RoboVLMs' .pt, or its state dict as .safetensors",
              "CONFIG.json": "RoboVLMs' config of the same run"}  # fmt: skip
    add = command(import_robovlms, "import-robovlms", True, source | workdir)
    add("--vlm", metavar="DIR", help="Hugging Face folder of the VLM: tokenizer and config.json")
    add("--statistics", metavar="FILE", help="octo's, openvla's, openpi's or RoboVLMs' statistics,"
        " for units not known here")  # fmt: skip
    source = {"SRC": "folder with params/ or model.safetensors, and mostly assets/"}
    add = command(import_openpi, "import-openpi", True, source | workdir)
    add("--config", metavar="FILE[:ARG]", required=True, help="our config, such as pi05_libero")
    add("--tokenizer", metavar="DIR", help="folder with PaliGemma's tokenizer: tokenizer.json, or"
        " openpi's paligemma_tokenizer.model alone")  # fmt: skip
    add("--asset", metavar="NAME", default="", help="whose statistics, of several in assets/")
    source = {"SRC": "folder with model.safetensors"}
    add = command(import_lerobot, "import-lerobot", True, source | workdir)
    add("--config", metavar="FILE[:ARG]", required=True, help="our config, such as smolvla")
    add("--tokenizer", metavar="DIR", help="folder with SmolVLM's tokenizer.json")
    add("--statistics", metavar="FILE", help="meta/stats.json of the dataset of the policy"
        " (default: SRC's own, if it has its processors)")  # fmt: skip
    source = {"SRC": "folder with config.json and weights, or with lora_adapter/"}
    add = command(import_openvla, "import-openvla", True, source | workdir)
    add("--config", metavar="FILE[:ARG]", required=True, help="our config, such as"
        " openvla_oft_libero or openvla_libero")  # fmt: skip
    add("--base", metavar="DIR", help="folder of the VLM that lora_adapter/ is added to")
    source = {"CKPT": "workdir of launch/train.py, or an imported one"}
    add = command(export_openvla, "export-openvla", False, source | {"OUT": "new folder"})
    add("--max-shard-gb", type=float, default=5.0, help="size of a file at most (default: 5)")
    add = command(export_lerobot, "export-lerobot", False, source | {"OUT": "new folder"})
    add("--vlm", metavar="NAME", default="", help="name or folder of the VLM, where LeRobot looks"
        " words and SmolVLM's sizes up (default: the imported or the released one)")  # fmt: skip
    add = command(export_openpi, "export-openpi", False, source | {"OUT": "new folder"})
    add("--format", default="jax", choices=("jax", "torch"), help="openpi's parameters (default),"
        " or the torch port's file; LeRobot's pi0 and pi0.5: export-lerobot")  # fmt: skip
    add = command(export_hf, "export-hf", False, source | {"OUT": "new folder"})
    add("--source", metavar="DIR", help="where tokenizer and processor files are copied from")
    add("--lora", default="merge", choices=("merge", "adapter"), help="add LoRA factors to the"
        " weights, or write them as a PEFT adapter in OUT/adapter (default: merge)")  # fmt: skip
    add("--max-shard-gb", type=float, default=5.0, help="size of a file at most (default: 5)")
    file = {"OUT": "new file, .pt or .safetensors"}
    add = command(export_robovlms, "export-robovlms", False, source | file)
    add("--bare", action="store_true", help="names without Lightning's leading 'model.'")
    add = command(push, "push", False, source | {"OUT": "new folder, which is what the hub gets"})
    add("--repo", metavar="USER/NAME", help="send OUT to this repository, and make that if need be")
    add("--public", action="store_true", help="let all see a repository that is made (default: no)")
    add("--layout", default="hf", choices=("hf", "checkpoint", "openpi", "lerobot"), help="as"
        " export-hf writes it (default), our checkpoint without the optimizer's state, or as the"
        " exports of these names")  # fmt: skip
    # What the exports of other names ask for, as they have it by default.
    parser_defaults = {"source": None, "lora": "merge", "max_shard_gb": 5.0}
    parser_defaults |= {"format": "jax", "vlm": ""}
    commands.choices["push"].set_defaults(**parser_defaults)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
