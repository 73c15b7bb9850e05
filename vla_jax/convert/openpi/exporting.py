"""Our pi0, pi0.5 and pi0-FAST -> openpi's checkpoints: Orbax, or the torch port's file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from vla_jax import rules
from vla_jax.config import ConfigError, resolve
from vla_jax.convert import card, maps, output
from vla_jax.convert.formats.safetensors import SUFFIX, Writer
from vla_jax.convert.hf.files import write_json
from vla_jax.convert.openpi import names
from vla_jax.convert.store import Stored
from vla_jax.models import vla

Done = Callable[[int], Any]  # takes the bytes just written
FORMATS = ("jax", "torch")
_COLUMNS = ("mean", "std", "q01", "q99")  # of openpi's norm_stats.json


def to_openpi(
    stored: Stored,
    out: str | Path,
    kind: str = "jax",
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    done: Done = lambda count: None,
) -> maps.Outgoing:
    """A folder that openpi's policies and trainer load, with the statistics where they look.

    Args:
        stored: the checkpoint.
        out: the new folder.
        kind: jax: `params/`; torch: `model.safetensors`.
        dtype: write everything in this type; None keeps each parameter's.
        overwrite: replace `out`.
        done: see `Done`.

    Raises:
        ConfigError: the model is none of openpi's.
        WeightError: the checkpoint and the weight map differ.
        OutputError: `out` is taken.
    """
    config = resolve(stored.meta["config"])
    model = vla.build(config.model)
    choices = model.config.structure.kind, model.config.head.kind
    writes = choices == ("discrete", "fast") and model.config.backbone.name == "paligemma"
    if not writes and (choices[0] != "expert" or model.config.expert.joint_every != 1):
        raise ConfigError(
            f"openpi has no model like {' + '.join(choices)}: pi0, pi0.5 and pi0-FAST on paligemma"
        )
    if writes and kind == "torch":
        raise ConfigError("openpi's torch port has no pi0-FAST: --format=jax")
    rows = (names.jax_rows if kind == "jax" else names.torch_rows)(model.config, model.arch)
    outgoing = maps.outgoing(rows, stored.leaves, dtype)
    with output.whole(out, overwrite) as folder:
        if kind == "jax":
            _write_params(folder / "params", outgoing, done)
        else:
            write_torch(folder / f"model{SUFFIX}", outgoing, model.config.expert.width, done)
        for asset, statistics in _statistics(stored.meta, config.data.datasets[0].spec).items():
            # openpi looks statistics up below the asset's name.
            path = folder / "assets" / asset
            path.mkdir(parents=True)
            write_json(path / "norm_stats.json", {"norm_stats": statistics})
        layout = card.OPENPI if kind == "jax" else card.OPENPI_TORCH
        card.write(folder / card.FILE, stored, layout)
    return outgoing


def _statistics(meta: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """Asset -> the statistics that the checkpoint's units are made of, in openpi's form."""
    # Of a model that was trained here, what it was imported with is not what it acts by.
    measured = {
        name: {
            group: {statistic: columns[statistic] for statistic in _COLUMNS if statistic in columns}
            for group, columns in entry["chunks"].items()
        }
        for name, entry in meta["statistics"].items()
        if "chunks" in entry
    }
    origin = meta.get("origin", {})
    if measured or not origin.get("norm_stats"):
        return measured
    return {origin.get("asset") or spec: origin["norm_stats"]}


def _write_params(folder: Path, outgoing: maps.Outgoing, done: Done) -> None:
    """The layers of a stack together again, all below `params`."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, value in outgoing.tensors():
        # The layers of a stack come in their order.
        stacks.setdefault(name.split("[")[0], []).append(value)
        done(value.nbytes)
    # A stack of one layer has a layer axis too, which the count of its parts does not show.
    layered = {name.split("[")[0] for name in outgoing.shapes if "[" in name}
    flat = {
        f"params/{name}": np.stack(parts) if name in layered else parts[0]
        for name, parts in stacks.items()
    }
    with ocp.PyTreeCheckpointer() as writer:
        # Orbax refuses relative paths.
        writer.save(folder.absolute(), rules.unflatten(flat))


def write_torch(
    path: Path, outgoing: maps.Outgoing, width: int, done: Done, prefix: str = ""
) -> None:
    """The port's file, with the expert's head, which it asks for and never uses, as zeros.

    Args:
        path: the file.
        outgoing: all else.
        width: the expert's.
        done: see `Done`.
        prefix: before every name; LeRobot's files have one.
    """
    table, head = prefix + names.TORCH_TABLE, prefix + names.TORCH_UNUSED
    vocab = outgoing.shapes[table][0]
    shapes = {**outgoing.shapes, head: (vocab, width)}
    dtypes = {**outgoing.dtypes, head: outgoing.dtypes[table]}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from outgoing.repeated()
        yield head, np.zeros(shapes[head], dtypes[head])

    with Writer(path, shapes, dtypes, None) as writer:
        for name, value in tensors():
            writer.write(name, value)
            done(value.nbytes)
