"""Our own train step on one fixed batch, our control step, and what PyTorch's side must know."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import serve
from bench.turns import Step
from configs import base
from vla_jax.config import Config
from vla_jax.inference.policy import Policy
from vla_jax.models import vla
from vla_jax.train import flops, lora, meter, state
from vla_jax.train import mesh as meshes
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import make_train_step
from vla_jax.types import Actions, Batch, Observation

TORCH = Path(__file__).with_name("torch_step.py")
# Towers of the mid-size model, vision and text alike.
SIZES = {"layers": 6, "width": 512, "heads": 8, "mlp": 2048}
TINY = {"layers": 2, "width": 64, "heads": 2, "mlp": 128}


def kosmos2(layers: int, width: int, heads: int, mlp: int) -> dict[str, Any]:
    """`model.backbone.arch` of a small Kosmos-2, with the released one's image and vocabulary."""
    sizes = {"patch_size": 14, "image_size": 224, "num_hidden_layers": layers}
    sizes |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": mlp}
    text = {"vocab_size": 65037, "embed_dim": width, "layers": layers}
    text |= {"attention_heads": heads, "ffn_dim": mlp}
    return {"latent_query_num": 64, "vision_config": sizes, "text_config": text}


def midsize(window: int = 8) -> Any:
    """Raw config of a Kosmos-2 policy head of 107.9 M numbers in float32."""
    c = base.get_config()
    c.model.backbone.arch = kosmos2(**SIZES)
    c.model.structure.update({"window": window, "chunk": 10, "text_len": 32})
    c.model.update({"dtype": "float32", "dropout": False})
    c.data.datasets = ({"spec": "calvin", "dir": "none", "weight": 1.0},)
    return c


def ours(config: Config, windows: int) -> Step:
    """The product's train step of a config on the first device of this process, ready to run.

    Args:
        config: of a policy head on Kosmos-2, as PyTorch's side has no other.
        windows: of a batch, each of `model.structure.window` frames.
    """
    device = jax.devices()[0]
    model, mesh = vla.build(config.model), meshes.make_mesh(config.mesh, [device])
    initial = lora.extend(lambda key: vla.initial_params(model, key), config.lora)
    optimizer = make_optimizer(config.optim, config.train.steps)
    template = state.abstract(initial, lora.train_rules(config), optimizer, mesh)
    current = state.create(initial, optimizer, template, 0)
    train_step = make_train_step(model, config, mesh, template, ("data",))
    batch = _batch(config, model.image.shape, windows)
    sharded = meshes.shard_batch(batch, mesh)
    facts = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(template.trainable)),
        "flops": flops.of_step(model, config, template, batch),
        "peak": flops.peak(device),
        "device": device.device_kind,
    }

    def run() -> Any:
        nonlocal current
        current, metrics = train_step(current, sharded)
        return metrics["loss"]

    return Step(run, float, facts, lambda: meter.device_gb([device]))


def control(checkpoint: Path) -> Step:
    """The mid-size policy of `bench.serve.save` as a server holds it, answering one robot.

    An answer is from observation to actions in the robot's units; its figure is their sum.
    """
    policy = Policy.from_checkpoint(checkpoint)
    seen = itertools.cycle([serve.observe(0, step, serve.SIZES["midsize"]) for step in range(8)])
    session: Any = policy.new_session()

    def run() -> Any:
        nonlocal session
        reply, session = policy.infer(session, next(seen))
        return reply["actions"]

    return Step(run, lambda actions: float(actions.sum()), {}, lambda: None)


def _batch(config: Config, image: tuple[int, int], windows: int) -> Batch:
    """Noise for images, and words that all count."""
    c, rng = config.model.structure, np.random.default_rng(0)
    frames, words = (windows, c.window), (windows, c.text_len)
    images = {
        camera: rng.integers(0, 255, (*frames, *image, 3), dtype=np.uint8) for camera in c.cameras
    }
    observation = Observation(
        images=images,
        image_mask={camera: np.ones(frames, bool) for camera in c.cameras},
        text=np.full(words, 5, np.int32),
        text_mask=np.ones(words, bool),
    )
    chunk = rng.uniform(-1, 1, (*frames, c.chunk, config.model.action_dim)).astype(np.float32)
    actions = Actions(chunk, np.ones((*frames, c.chunk), bool))
    return Batch(observation, actions, np.zeros((windows, 2), np.uint32), np.zeros(windows, "i4"))


def for_torch(config: Config, windows: int) -> dict[str, Any]:
    """What bench/torch_step.py takes as --model."""
    c = config.model.structure
    return {
        "arch": vla.build(config.model).arch,
        "head": dataclasses.asdict(config.model.head),
        "windows": windows,
        "window": c.window,
        "cameras": len(c.cameras),
        "text_len": c.text_len,
        "chunk": c.chunk,
        "dropout": config.model.dropout,
        "dtype": config.model.dtype,
        "clip_norm": config.optim.clip_norm,
    }
