"""The published vision towers: what each is made of, and under which names its weights are kept.

A pair of functions a family: the first makes a `VisionSpec` of the family's configuration, the
second the weight map. Families that several backbones share stand here, so that each backbone's
file can name the one it has; nothing below this file knows a model by name.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vla_jax.models import weights as w
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.positions import Grid
from vla_jax.models.towers.resampler import PatchMerger, PositionedQueries
from vla_jax.models.towers.vit import VisionSpec

Config = Mapping[str, Any]


def _hugging_face(config: Config, **facts: Any) -> VisionSpec:
    """CLIP's and SigLIP's common `vision_config`."""
    side = config["image_size"] // config["patch_size"]
    return VisionSpec(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        block=BlockSpec(
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            activation=config["hidden_act"],
            eps=config["layer_norm_eps"],
            attention_dropout=config["attention_dropout"],
        ),
        patch=config["patch_size"],
        grid=(side, side),
        table=(side, side),
        **facts,
    )


def clip(config: Config, **facts: Any) -> VisionSpec:
    """OpenAI's CLIP from a `clip_vision_model` config; `facts` are further `VisionSpec` fields.

    `post_norm` is off: the original norms the class token alone, and what a backbone does differs.
    """
    return _hugging_face(config, patch_bias=False, class_token=True, pre_norm=True, **facts)


def siglip(config: Config, **facts: Any) -> VisionSpec:
    """SigLIP from a `siglip_vision_model` config, without its pooling head."""
    return _hugging_face(config, post_norm=True, **facts)


def hugging_face_weights(spec: VisionSpec, source: str, target: str) -> list[w.Weight]:
    """CLIP and SigLIP under Hugging Face's names.

    Args:
        spec: which of the parameters there are.
        source: up to and with the dot before `embeddings`.
        target: up to and with the slash before `patch`.
    """
    rows = [*w.attention("self_attn", "attn"), *_norms("layer_norm1", "layer_norm2")]
    rows += [*w.pair("mlp.fc1", "mlp/fc1"), *w.pair("mlp.fc2", "mlp/fc2")]
    layer = w.prefixed(rows, "encoder.layers.{}.", "layers/")
    embeddings = {
        "patch": "embeddings.patch_embedding",
        "positions": "embeddings.position_embedding.weight",
        "class_token": "embeddings.class_embedding",
        # Spelled so by Hugging Face.
        "pre_norm": "pre_layrnorm",
        "post_norm": "post_layernorm",
    }
    return w.prefixed([*_outside(spec, embeddings), *layer], source, target)


def open_clip(
    width: int, layers: int, heads: int, hidden: int, patch: int, side: int, **facts: Any
) -> VisionSpec:
    """open_clip's and OpenAI's own CLIP towers; `side` is of the image, pixels."""
    grid = (side // patch, side // patch)
    # The defaults are those of OpenAI's CLIP.
    facts = {"activation": "quick_gelu", "eps": 1e-5, "table": grid, **facts}
    block = BlockSpec(heads, hidden, facts.pop("activation"), eps=facts.pop("eps"))
    return VisionSpec(
        width=width,
        layers=layers,
        block=block,
        patch=patch,
        grid=grid,
        patch_bias=False,
        pre_norm=True,
        **facts,
    )


def qwen_vl(config: Config) -> VisionSpec:
    """Qwen-VL's tower from the `visual` part of its config: open_clip's without class token."""
    return open_clip(
        config["width"],
        config["layers"],
        config["heads"],
        int(config["width"] * config["mlp_ratio"]),
        config["patch_size"],
        config["image_size"],
        activation="gelu",
        eps=1e-6,
        table=(16, 16),  # of 224 pixels; the released model resamples it to 448
    )


def qwen_vl_resampler(
    spec: VisionSpec, queries: int, width: int, dtype: Any = jnp.float32
) -> PositionedQueries:
    """What follows Qwen-VL's tower: `queries` tokens of the text's width, heads of 128."""
    # The queries stand on a square grid.
    side = round(queries**0.5)
    # Small models for tests are narrower than one head.
    heads = max(width // 128, 1)
    return PositionedQueries((side, side), spec.grid, width, heads, spec.block.eps, dtype)


def open_clip_weights(
    spec: VisionSpec, source: str, target: str, by_head: bool = False
) -> list[w.Weight]:
    """open_clip's names.

    Args:
        spec: which of the parameters there are.
        source: up to and with the dot before `conv1`.
        target: up to and with the slash before `patch`.
        by_head: Qwen-VL's joint projection: a Linear with q, k, v of each head together.
    """
    rows = _norms("ln_1", "ln_2")
    if by_head:
        rows += w.pair("attn.in_proj", "attn/{q,k,v}", "interleaved_linear")
        rows += w.pair("attn.out_proj", "attn/o", "linear_from_heads")
    else:
        rows += w.multihead("attn", "attn")
    rows += [*w.pair("mlp.c_fc", "mlp/fc1"), *w.pair("mlp.c_proj", "mlp/fc2")]
    layer = w.prefixed(rows, "transformer.resblocks.{}.", "layers/")
    outside = {
        "patch": "conv1",
        "positions": "positional_embedding",
        "class_token": "class_embedding",
        "pre_norm": "ln_pre",
        "post_norm": "ln_post",
    }
    return w.prefixed([*_outside(spec, outside), *layer], source, target)


def timm_siglip(
    width: int, layers: int, heads: int, hidden: int, patch: int, side: int, eps: float = 1e-5
) -> VisionSpec:
    """Moondream's tower: SigLIP So400m with linear patches, and torch's default eps."""
    grid = (side // patch, side // patch)
    block = BlockSpec(heads, hidden, "gelu_pytorch_tanh", eps=eps)
    return VisionSpec(width, layers, block, patch, grid, table=grid, post_norm=True)


def prismatic(config: Config, film: bool) -> VisionSpec:
    """One of Prismatic's two towers, timm's DINOv2 (with registers) or SigLIP.

    Both give the output of the layer before the last, without the norm. With `film` their layers
    follow a condition (OpenVLA-OFT).
    """
    side, registers = config["image_size"] // config["patch_size"], config["registers"]
    block = BlockSpec(
        config["num_attention_heads"],
        config["intermediate_size"],
        "gelu",  # exact in both, where Hugging Face's SigLIP has the approximation
        eps=1e-6,
        # DINOv2 has layer scales as it has registers, SigLIP has neither.
        layer_scale=registers > 0,
        film=film,
    )
    return VisionSpec(
        config["hidden_size"],
        config["num_hidden_layers"],
        block,
        config["patch_size"],
        grid=(side, side),
        table=(side, side),
        class_token=registers > 0,
        class_position=False,
        keep_class=False,
        registers=registers,
        post_norm=True,
        take=-2,
    )


def prismatic_weights(spec: VisionSpec, source: str, target: str) -> list[w.Weight]:
    """Names of timm, as OpenVLA renames the layer scales; with FiLM those of OFT's wrapper.

    Args:
        spec: which of the parameters there are.
        source: up to and with the dot before `patch_embed`.
        target: up to and with the slash before `patch`.
    """
    rows = [*_norms("norm1", "norm2"), *w.pair("attn.qkv", "attn/{q,k,v}")]
    rows += w.pair("attn.proj", "attn/o", "linear_from_heads")
    rows += [*w.pair("mlp.fc1", "mlp/fc1"), *w.pair("mlp.fc2", "mlp/fc2")]
    if spec.block.layer_scale:
        rows += [w.Weight(f"ls{i}.scale_factor", f"scale{i}") for i in (1, 2)]
    if spec.block.film:
        rows = w.prefixed(rows, "block.", "")
        rows += [*w.pair("scale", "film_scale"), *w.pair("shift", "film_shift")]
    outside = [
        *w.pair("patch_embed.proj", "patch", "patch"),
        w.Weight("pos_embed", "positions", "leading_1"),
        *w.norm("norm", "post_norm"),
    ]
    if spec.class_token:
        outside.append(w.Weight("cls_token", "class_token", "leading_1_1"))
    if spec.registers:
        outside.append(w.Weight("reg_token", "registers", "leading_1"))
    return w.prefixed([*outside, *w.prefixed(rows, "blocks.{}.", "layers/")], source, target)


def moondream_weights(source: str, target: str) -> list[w.Weight]:
    """Moondream's names of 2024.

    Args:
        source: up to and with the dot before `patch_embed`.
        target: up to and with the slash before `patch`.
    """
    rows = [*_norms("norm1", "norm2"), *w.pair("attn.qkv", "attn/{q,k,v}")]
    rows += w.pair("attn.proj", "attn/o", "linear_from_heads")
    rows += [*w.pair("mlp.fc1", "mlp/fc1"), *w.pair("mlp.fc2", "mlp/fc2")]
    outside = [
        *w.pair("patch_embed.linear", "patch", "linear_patch"),
        w.Weight("pos_embed", "positions", "leading_1"),
        *w.norm("norm", "post_norm"),
    ]
    return w.prefixed([*outside, *w.prefixed(rows, "blocks.{}.", "layers/")], source, target)


def uform(config: Config) -> VisionSpec:
    """UForm-Gen's tower from its flat config: layer scales, a class token without position."""
    side = config["image_size"] // config["image_encoder_patch_size"]
    width = config["image_encoder_hidden_size"]
    return VisionSpec(
        width=width,
        layers=config["image_encoder_num_layers"],
        block=BlockSpec(
            config["image_encoder_num_heads"], 4 * width, "gelu", eps=1e-6, layer_scale=True
        ),
        patch=config["image_encoder_patch_size"],
        grid=(side, side),
        table=(side, side),
        class_token=True,
        class_position=False,
        post_norm=True,
    )


def uform_weights(source: str, target: str) -> list[w.Weight]:
    """UForm's names (unum-cloud/uform, VisualEncoder)."""
    rows = _norms("norm1", "norm2")
    for name, path in (("query", "q"), ("key", "k"), ("value", "v")):
        rows += w.pair(f"attn.{name}", f"attn/{path}")
    rows += w.pair("attn.out", "attn/o", "linear_from_heads")
    rows += w.pair("mlp.hidden_layer", "mlp/fc1") + w.pair("mlp.output_layer", "mlp/fc2")
    rows += [w.Weight("ls1.weight", "scale1"), w.Weight("ls2.weight", "scale2")]
    outside = [
        *w.pair("patch_embed", "patch", "patch"),
        w.Weight("pos_embed", "positions", "leading_1"),
        w.Weight("cls_token", "class_token", "leading_1_1"),
        *w.norm("norm", "post_norm"),
    ]
    return w.prefixed([*outside, *w.prefixed(rows, "blocks.{}.", "layers/")], source, target)


def qwen2_vl(config: Config, grid: Grid) -> VisionSpec:
    """Qwen2-VL's tower from its `vision_config`, for images of `grid` patches."""
    width = config["embed_dim"]
    hidden = int(width * config["mlp_ratio"])
    block = BlockSpec(config["num_heads"], hidden, config["hidden_act"], eps=1e-6)
    return _qwen2(config, grid, width, block)


def qwen2_5_vl(config: Config, grid: Grid) -> VisionSpec:
    """Qwen2.5-VL's: RMS norms, gated MLPs, windows of attention in most layers."""
    block = BlockSpec(
        config["num_heads"],
        config["intermediate_size"],
        config["hidden_act"],
        norm="rms",
        eps=1e-6,
        gated=True,
    )
    merge = config["spatial_merge_size"]
    # As the original counts: whole merged patches a window.
    window = config["window_size"] // merge // config["patch_size"] * merge
    full = tuple(config["fullatt_block_indexes"])
    width = config["hidden_size"]
    return _qwen2(config, grid, width, block, window=window, full_layers=full)


def qwen3_vl(config: Config, grid: Grid) -> VisionSpec:
    """Qwen3-VL's: learned positions beside the rotation, taps for the decoder's first layers."""
    block = BlockSpec(
        config["num_heads"], config["intermediate_size"], config["hidden_act"], eps=1e-6
    )
    # The stored table is a square, and is resampled to the image's grid.
    side = round(config["num_position_embeddings"] ** 0.5)
    return _qwen2(
        config,
        grid,
        config["hidden_size"],
        block,
        patch_bias=True,
        table=(side, side),
        resampling="bilinear_corners",
        taps=tuple(config["deepstack_visual_indexes"]),
    )


def _qwen2(
    config: Config, grid: Grid, width: int, block: BlockSpec, patch_bias: bool = False, **facts: Any
) -> VisionSpec:
    return VisionSpec(
        width=width,
        layers=config["depth"],
        block=block,
        patch=config["patch_size"],
        grid=grid,
        frames=config["temporal_patch_size"],
        patch_bias=patch_bias,
        # A constant of the original's code, which no config holds.
        rope_theta=10000.0,
        **facts,
    )


def qwen2_weights(spec: VisionSpec, source: str, target: str) -> list[w.Weight]:
    """Qwen2-VL's names and those of the later ones, without the mergers."""
    # RMS norms (Qwen2.5-VL) have no bias.
    biased = spec.block.norm == "layer"
    rows = _norms("norm1", "norm2", biased)
    rows += w.pair("attn.qkv", "attn/{q,k,v}")
    rows += w.pair("attn.proj", "attn/o", "linear_from_heads")
    # Of these towers Qwen3-VL alone has a table of positions, and other names.
    numbered = "mlp.linear_fc" if spec.table else "mlp.fc"
    names = {f"{numbered}1": "mlp/fc1", f"{numbered}2": "mlp/fc2"}
    if spec.block.gated:
        names = {f"mlp.{n}_proj": f"mlp/{n}" for n in ("gate", "up", "down")}
    for name, path in names.items():
        rows += w.pair(name, path)
    outside = _outside(spec, {"patch": "patch_embed.proj", "positions": "pos_embed.weight"})
    return w.prefixed([*outside, *w.prefixed(rows, "blocks.{}.", "layers/")], source, target)


def qwen2_merger(
    spec: VisionSpec,
    config: Config,
    deepstack: bool = False,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> PatchMerger:
    """What follows the tower, and each tap with `deepstack`.

    The text's width is `hidden_size` in Qwen2-VL's vision config, `out_hidden_size` later.
    """
    return PatchMerger(
        spec.grid,
        config["spatial_merge_size"],
        config.get("out_hidden_size", config["hidden_size"]),
        spec.block.norm,
        norm_merged=deepstack,
        dtype=dtype,
        name=name,
    )


def qwen2_merger_weights(spec: VisionSpec) -> list[w.Weight]:
    """Rows of `qwen2_merger`, from its root."""
    # Qwen3-VL, the one with a table of positions, renamed everything.
    names = ("norm", "linear_fc1", "linear_fc2") if spec.table else ("ln_q", "mlp.0", "mlp.2")
    norm = w.norm(names[0], "norm", bias=spec.block.norm == "layer")
    return [*norm, *w.pair(names[1], "fc1"), *w.pair(names[2], "fc2")]


def _norms(first: str, second: str, bias: bool = True) -> list[w.Weight]:
    return [*w.norm(first, "norm1", bias), *w.norm(second, "norm2", bias)]


def _outside(spec: VisionSpec, names: Mapping[str, str]) -> list[w.Weight]:
    """Rows of what stands before and after the layers, as far as the tower has it."""
    rows = w.pair(names["patch"], "patch", "patch", spec.patch_bias)
    if spec.table:
        rows.append(w.Weight(names["positions"], "positions"))
    if spec.class_token:
        rows.append(w.Weight(names["class_token"], "class_token"))
    if spec.pre_norm:
        rows += w.norm(names["pre_norm"], "pre_norm")
    if spec.post_norm:
        rows += w.norm(names["post_norm"], "post_norm")
    return rows
