"""Run by a Python that has openpi: a small model of openpi's own classes, and what we export of it.

    python openpi_side.py make KIND FOLDER              writes FOLDER/params and FOLDER/io.npz
    python openpi_side.py load KIND FOLDER EXPORTED OUT  reads both params, writes OUT

KIND is pi0, pi05 or fast. The sizes are openpi's "dummy" ones; its vision tower has no such size,
so that the smallest of its own list with several layers takes the place of the released one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from openpi.models import (  # type: ignore[import-not-found]
    gemma,
    gemma_fast,
    model,
    pi0_config,
    pi0_fast,
    siglip,
)

DIM, HORIZON, PROMPT, STEPS, ANSWER = 8, 6, 20, 10, 12
CAMERAS = {
    "pi0": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    "fast": ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
}
CAMERAS["pi05"] = CAMERAS["pi0"]


def shrink() -> None:
    """Small sizes at the two functions that name them."""
    tower = siglip.Module
    siglip.Module = lambda classes=None, *, variant, **rest: tower(
        num_classes=rest.pop("num_classes", classes), variant="Ti/14", **rest
    )
    sizes, released = vars(gemma.get_config("dummy")), gemma_fast.get_config("gemma_2b").to_dict()
    small = {**released, **{k: v for k, v in sizes.items() if k in released}, "vocab_size": 1024}
    gemma_fast.get_config = lambda variant: ml_collections.ConfigDict(small)


def config(kind: str) -> Any:
    sizes = {"dtype": "float32", "action_dim": DIM, "action_horizon": HORIZON}
    if kind == "fast":
        return pi0_fast.Pi0FASTConfig(max_token_len=PROMPT, **sizes)
    variants = {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    return pi0_config.Pi0Config(pi05=kind == "pi05", max_token_len=PROMPT, **variants, **sizes)


def observation(io: Any, kind: str) -> Any:
    recorded = {
        "image": {name: io[f"obs/image/{name}"] for name in CAMERAS[kind]},
        "image_mask": {name: io[f"obs/image_mask/{name}"] for name in CAMERAS[kind]},
        "state": io["obs/state"],
        "tokenized_prompt": io["obs/tokenized_prompt"],
        "tokenized_prompt_mask": io["obs/tokenized_prompt_mask"],
    }
    if kind == "fast":
        recorded |= {"token_ar_mask": np.zeros_like(recorded["tokenized_prompt"])}
        recorded |= {"token_loss_mask": np.zeros_like(recorded["tokenized_prompt_mask"])}
    return model.Observation.from_dict(jax.tree.map(jax.numpy.asarray, recorded))


def make(kind: str, folder: str) -> None:
    """Random parameters, none of them zero, and an observation with holes in it."""
    rng = np.random.default_rng(0)
    state = nnx.state(config(kind).create(jax.random.key(0))).to_pure_dict()
    flat: dict[Any, Any] = traverse_util.flatten_dict(state)
    flat = {k: v + 0.05 * rng.normal(size=v.shape).astype(v.dtype) for k, v in flat.items()}
    with ocp.PyTreeCheckpointer() as writer:
        where = Path(folder, "params").absolute()
        writer.save(where, {"params": traverse_util.unflatten_dict(flat)})
    io: dict[str, Any] = {
        f"obs/image/{name}": rng.integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
        for name in CAMERAS[kind]
    }
    io |= {f"obs/image_mask/{name}": np.ones(2, bool) for name in CAMERAS[kind]}
    if kind != "fast":
        io[f"obs/image_mask/{CAMERAS[kind][2]}"][0] = False
    io["obs/tokenized_prompt"] = rng.integers(3, 900, (2, PROMPT)).astype(np.int32)
    io["obs/tokenized_prompt_mask"] = np.arange(PROMPT) < np.array([[PROMPT - 7], [PROMPT]])
    io["obs/state"] = rng.normal(size=(2, DIM)).astype(np.float32)
    io["sample/noise"] = rng.normal(size=(2, HORIZON, DIM)).astype(np.float32)
    np.savez(Path(folder, "io.npz"), **io)


def load(kind: str, folder: str, exported: str, out: str) -> None:
    """Both folders by openpi's own loader; actions of a model that is made of ours alone."""
    restored: list[Any] = [
        traverse_util.flatten_dict(model.restore_params(Path(f, "params"), restore_type=np.ndarray))
        for f in (folder, exported)
    ]
    first, second = restored
    differing = [
        "/".join(map(str, k))
        for k in first.keys() | second.keys()
        if k not in first
        or k not in second
        or first[k].dtype != second[k].dtype
        or first[k].tobytes() != second[k].tobytes()
    ]
    io = dict(np.load(Path(folder, "io.npz")))
    policy = config(kind).load(
        model.restore_params(Path(exported, "params")), remove_extra_params=False
    )
    key, observed = jax.random.key(0), observation(io, kind)
    if kind == "fast":
        actions = policy.sample_actions(key, observed, max_decoding_steps=ANSWER)
    else:
        actions = policy.sample_actions(key, observed, num_steps=STEPS, noise=io["sample/noise"])
    report = {"differing": sorted(differing), "tensors": len(second), "jax": jax.__version__}
    np.savez(out, actions=np.asarray(actions), report=json.dumps(report))


if __name__ == "__main__":
    shrink()
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])
