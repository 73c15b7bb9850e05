"""The product's own steps as programs, lowered for devices that need not be there."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs import tiny
from vla_jax.config import Config, resolve
from vla_jax.models import vla
from vla_jax.models.backbones import BACKBONES
from vla_jax.train import lora, state
from vla_jax.train.evaluate import make_eval_step
from vla_jax.train.mesh import batch_sharding, make_mesh
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import make_train_step
from vla_jax.types import Actions, Batch, Captions, Observation

# A head for each structure, so that every head is used; the discrete one takes only its own.
HEADS = {
    "one_step": "mlp",
    "discrete": "detokenizer",
    "interleaved": "gpt2",
    "policy_head": "lstm",
    "video": "flow",
    "expert": "expert_flow",
    "parallel": "l1",
}
# Those that see one step.
_STEPWISE = ("one_step", "expert", "parallel")


def config(backbone: str, structure: str, head: str = "", **changes: Any) -> Config:
    """A very small model of that kind, with dropout; dotted keys change it further."""
    raw = tiny.get_config(backbone)
    spliced = BACKBONES[backbone].LAYOUT.images == "spliced"
    stepwise = structure in _STEPWISE or head == "fast"
    window = 1 if stepwise or (structure == "discrete" and not spliced) else 3
    raw.model.structure.update({"kind": structure, "window": window, "chunk": 2, "text_len": 9})
    raw.model.head.update({"kind": head or HEADS[structure], "hidden": 16, "layers": 2})
    raw.model.head.update({"heads": 2, "bins": 20, "sampling_steps": 4})
    raw.model.update({"dropout": True, "remat": "full"})
    if structure in ("expert", "parallel"):
        raw.model.structure.proprio = 7  # a part of the expert's prompt, a token of the other
    raw.model.fast.update({"prompt": "pi0", "length": 8, "images": "backbone"})
    with raw.unlocked():
        raw.update_from_flattened_dict(changes)
    return resolve(raw)


def batch(config: Config, rows: int, captions: int = 0) -> Batch:
    """Shapes of a batch of so many windows and captions."""

    def zeros(kind: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(kind))

    model, s = vla.build(config.model), config.model.structure
    size, shape = model.image.shape, (rows, s.window)
    written = vla.written(config.model)
    text = zeros("int32", captions, 12), *(zeros("bool", captions, 12) for _ in range(2))
    beside = Captions(zeros("uint8", captions, *size, 3), zeros("bool", captions), *text)
    return Batch(
        Observation(
            images={camera: zeros("uint8", *shape, *size, 3) for camera in s.cameras},
            image_mask={camera: zeros("bool", *shape) for camera in s.cameras},
            text=zeros("int32", rows, s.text_len),
            text_mask=zeros("bool", rows, s.text_len),
            proprio=zeros("float32", *shape, s.proprio) if s.proprio else None,
        ),
        Actions(
            zeros("float32", *shape, s.chunk, config.model.action_dim),
            zeros("bool", *shape, s.chunk),
            zeros("int32", rows, written) if written else None,
        ),
        sample=zeros("uint32", rows, 2),
        dataset=zeros("int32", rows),
        captions=beside if captions else None,
    )


def lower(config: Config, rows: int, captions: int = 0, kind: str = "train") -> Any:
    """The train (or "eval") step, lowered for all devices and the mesh that the config asks for."""
    mesh = make_mesh(config.mesh)
    model, template = abstract_state(config, mesh)
    make = {"train": make_train_step, "eval": make_eval_step}[kind]
    step: Any = make(model, config, mesh, template)
    where = batch_sharding(mesh)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        batch(config, rows, captions),
    )
    return step.trace(template, placed).lower()


def abstract_state(config: Config, mesh: Mesh) -> tuple[Any, state.TrainState]:
    """The model and the shapes of its state."""
    model = vla.build(config.model)
    init = lora.extend(functools.partial(vla.initial_params, model), config.lora)
    optimizer = make_optimizer(config.optim, config.train.steps)
    average = config.optim.ema_decay > 0
    rules = lora.train_rules(config)
    return model, state.abstract(init, rules, optimizer, mesh, ema=average)


def filled(config: Config, rows: int, seed: int = 0) -> Batch:
    """A batch of random numbers in the shapes of `batch`; all actions are supervised."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if x.dtype == np.float32:
            return rng.uniform(0, 1, x.shape).astype(np.float32)
        return rng.integers(5, 100, x.shape).astype(x.dtype)

    return jax.tree.map(draw, batch(config, rows))
