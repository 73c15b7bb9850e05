"""Full-size checkpoints by name and shape: each consumed exactly once, and written again."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import arrays
from tests.parity import original
from tests.parity.table import Row, compare
from vla_jax.convert import maps
from vla_jax.convert.tensors import renamed
from vla_jax.models import vla, weights
from vla_jax.models.backbones import BACKBONES
from vla_jax.rules import flatten

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Full:
    """What a folder's `full_param_names*.txt` are the names of.

    Attributes:
        backbone: of ours.
        arch: where it is not the released architecture.
        whole: a RoboVLMs checkpoint (LSTM head, one action token), not the VLM alone.
        file: of the folder, if it has several models.
    """

    backbone: str
    arch: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    file: str = ""


def _qwen2_7b(width: str) -> dict[str, Any]:
    """What Qwen2-VL-7B and Qwen2.5-VL-7B change; their towers call the text's width differently."""
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    text |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    return {
        "vision_config": {width: 3584},
        "text_config": text,
        "tie_word_embeddings": False,
    }


QWEN3_4B = {
    "vision_config": {"out_hidden_size": 2560},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
QWEN3_8B = {
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": (8, 16, 24),
    },
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "tie_word_embeddings": False,
}
# The first generation of UForm-Gen.
UFORM_1 = {
    "image_size": 224,
    "image_encoder_hidden_size": 768,
    "image_encoder_patch_size": 16,
    "image_encoder_num_layers": 12,
    "image_encoder_embedding_dim": 256,
    "image_pooler_intermediate_size": 5504,
    "image_pooler_num_latents": 196,
    "image_pooler_project_first": True,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32003,
        "hidden_size": 2048,
        "num_key_value_heads": 16,
        "intermediate_size": 5504,
        "tie_word_embeddings": False,
    },
}

# folder -> its models
FULL: dict[str, tuple[Full, ...]] = {
    "open_flamingo_3b_mpt1b": (Full("flamingo", {"text_config": {"vocab_size": 50432}}),),
    "open_flamingo_4b_rpj3b": (
        Full("flamingo", {"text_config": {"model_type": "gpt_neox", "vocab_size": 50432}}),
    ),
    "hf_kosmos2": (Full("kosmos2"),),
    "hf_qwen_vl": (Full("qwen_vl"),),
    "hf_qwen2_vl": (
        Full("qwen2_vl", file="full_param_names.2b.tf5.txt"),
        Full("qwen2_vl", _qwen2_7b("hidden_size"), file="full_param_names.7b.tf5.txt"),
    ),
    "hf_qwen2_5_vl": (
        Full("qwen2_5_vl", file="full_param_names.3b.tf5.txt"),
        Full("qwen2_5_vl", _qwen2_7b("out_hidden_size"), file="full_param_names.7b.tf5.txt"),
    ),
    "hf_qwen3_vl": (
        Full("qwen3_vl", file="full_param_names.2b.tf5.txt"),
        Full("qwen3_vl", QWEN3_4B, file="full_param_names.4b.tf5.txt"),
        Full("qwen3_vl", QWEN3_8B, file="full_param_names.8b.tf5.txt"),
    ),
    "hf_moondream2_22565c0": (Full("moondream"),),
    "hf_moondream2_5f520ae": (Full("moondream", {"vision_config": {"streams": 1}}),),
    "hf_uform_gen_llama": (Full("uform", UFORM_1),),
    "moondream_new_torch": (Full("moondream"),),
    "hf_ofa": (Full("ofa"),),
    "hf_llava_llama": (Full("llava"),),
    "llava_original_7b": (Full("llava", {"text_config": {"vocab_size": 32000}}),),
    "llava_original_mpt7b": (Full("llava_mpt", {"vision_config": {"image_size": 336}}),),
    "hf_smolvlm": (Full("smolvlm"),),
    "hf_paligemma1": (Full("paligemma"),),
    "hf_paligemma2": (Full("paligemma2"),),
    "robokosmos_full_calvin_ws8": (Full("kosmos2", whole=True),),
    "robokosmos_full_hand_ws16": (Full("kosmos2", whole=True),),
    "robopaligemma_full": (Full("paligemma", whole=True),),
}


def run(folder: Path) -> Iterator[Row]:
    """Zero errors when every name is consumed exactly once, and the same set is written."""
    paths = sorted(folder.glob("full_param_names*.txt"))
    for full in FULL[folder.name]:
        for path in paths:
            if full.file in ("", path.name):
                yield from _file(full, path)


def _file(full: Full, path: Path) -> Iterator[Row]:
    backbone = BACKBONES[full.backbone]
    arch = backbone.arch(full.arch)
    config = original.model_config({}, full.backbone, arch)
    reference = _named(path)
    ours = _shapes(vla.build(config))
    if full.whole:
        rows, ignore = maps.robovlms(config)
    else:
        rows, ignore = maps.hugging_face(config)
        ours = {k: v for k, v in ours.items() if k.startswith("backbone/")}
    renames = () if full.whole else backbone.RENAMES
    results = {renamed(name, renames): shape for name, shape in reference.items()}
    report = weights.check(rows, ours, results, ignore)
    problems = sum(map(len, (report.missing, report.unexpected, report.misshaped)))
    text = f"{path.name}: {len(reference)} names consumed once"
    yield compare(text + (f"\n{report}" if report else ""), problems, 0, 0.0)
    written = {name for row in rows for name in row.expand(ours[row.targets[0]][0])}
    carried = {name for name in results if not weights.ignored(name, ignore)}
    yield compare(f"{path.name}: the same set written", len(written ^ carried), 0, 0.0)


def _named(path: Path) -> Shapes:
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: tuple(json.loads(shape)) for name, shape, *_ in lines}


def _shapes(model: vla.VLA) -> Shapes:
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def exported(
    rows: list[weights.Weight],
    flat: Mapping[str, Any],
    theirs: Mapping[str, np.ndarray],
    ignore: Iterable[str] | None = None,
) -> Row:
    """Zero error when every tensor of theirs that the map names came back to the bit.

    With `ignore`, also when the map names all others, and nothing else.
    """
    back: dict[str, np.ndarray] = {}
    for row in rows:
        back |= arrays.to_theirs(row, flat)
    changed = [k for k in back if k in theirs and not np.array_equal(back[k], theirs[k])]
    if ignore is not None:
        changed += {k for k in theirs if not weights.ignored(k, ignore)} ^ back.keys()
    message = f" ({', '.join(changed)} changed)" if changed else ""
    return compare(f"{len(back)} tensors, exported again{message}", len(changed), 0, 0.0)
