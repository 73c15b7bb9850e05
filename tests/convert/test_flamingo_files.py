"""OpenFlamingo's files and RoboFlamingo's, where most tensors have several names."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from configs import base
from tests.models import tiny
from vla_jax.convert import maps
from vla_jax.convert.formats import torch_write
from vla_jax.convert.hf import source as hf
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.convert.tensors import Lazy
from vla_jax.models import vla
from vla_jax.models.backbones import flamingo
from vla_jax.models.weights import WeightError
from vla_jax.rules import flatten

CLIP_TEXT = {"width": 8, "layers": 1, "heads": 2, "vocab_size": 12, "context_length": 5}


def filled(**arch):
    """The model of a small config, and random parameters, flat."""
    config = tiny.config("policy_head", "lstm", "flamingo")
    config.backbone.arch.update(arch)
    model = vla.build(config)
    tree = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in flatten(tree).items()}
    return model.config, flat


def shapes(flat):
    return {path: value.shape for path, value in flat.items()}


def lazy(flat):
    return {k: Lazy(v.shape, v.dtype, lambda v=v: v) for k, v in flat.items()}


def assert_same(leaves, flat):
    assert set(leaves) == set(flat)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf.read(), flat[path], err_msg=path)


def test_robovlms_round_trip_of_every_name(tmp_path):
    config, flat = filled(clip_text_config=CLIP_TEXT)
    rows, ignore = maps.robovlms(config)
    reference = dict(maps.outgoing(rows, lazy(flat)).repeated())
    gate = "transformer.blocks.1.gated_cross_attn_layer.attn_gate"
    twice = [f"model.{root}.{gate}" for root in ("backbone", "model")]
    thrice = [f"model.{root}.gated_cross_attn_layers.1.attn_gate" for root in ("backbone", "model")]
    assert {*twice, *thrice, "model.vision_encoder.logit_scale"} <= set(reference)

    def read(tensors):
        save_file(tensors, tmp_path / "x.safetensors")
        source = robovlms.open_source(tmp_path / "x.safetensors")
        bare, _ = maps.robovlms(config, prefix="")
        return maps.incoming(bare, shapes(flat), source, ignore, unequal=source.unequal())

    assert_same(read(reference).leaves, flat)
    for name in (twice[1], thrice[0], "model.backbone.old_decoder_blocks.0.ln_1.weight"):
        with pytest.raises(WeightError, match="differ from their original"):
            read({**reference, name: reference[name] + 1})


def test_the_released_files_side_by_side(tmp_path):
    """A language model's own file, CLIP's own, and what was trained."""
    config, flat = filled()
    flat = {path: value for path, value in flat.items() if path.startswith("backbone/")}
    rows, ignore = maps.hugging_face(config)
    reference = dict(maps.outgoing(rows, lazy(flat)).tensors())
    trained = {k: v for k, v in reference.items() if "gated" in k or "perceiver" in k or "wte" in k}
    clip = {
        k.replace("vision_encoder.", "visual."): v
        for k, v in reference.items()
        if k.startswith("vision_encoder.")
    }
    clip |= {"transformer.resblocks.0.ln_1.weight": np.ones(3, np.float32), "logit_scale": 1.0}
    language = {
        k.replace("lang_encoder.", "").replace("decoder_layer.", ""): v
        for k, v in reference.items()
        if k.startswith("lang_encoder.") and "gated" not in k
    }
    language["transformer.wte.weight"] = language["transformer.wte.weight"] + 1
    save_file(language, tmp_path / "model.safetensors")
    clip = {k: np.asarray(v, np.float32) for k, v in clip.items()}
    save_file(clip, tmp_path / "open_clip_model.safetensors")
    sizes, kinds = shapes(trained), {k: v.dtype for k, v in trained.items()}
    torch_write.write(
        tmp_path / "checkpoint.pt", sizes, kinds, {}, lambda: iter(trained.items()), lambda _: None
    )
    source = hf.open_source(tmp_path, config)
    assert_same(maps.incoming(rows, shapes(flat), source, ignore).leaves, flat)


def test_config_of_a_trained_policy():
    reference = {
        "robovlm_name": "RoboFlamingo",
        "vlm": {"name": "mpt_3b_ift"},
        "act_head": {
            "type": "LSTMDecoder",
            "down_sample": "pooling",
            "action_space": "down_sample",
        },
        "window_size": 8,
        "fwd_pred_next_n": 10,
        "train_dataset": {"type": "DiskCalvinDataset"},
    }
    raw = robovlms.to_config(reference, base.get_config().to_dict())
    structure, arch = (
        raw["model"]["structure"],
        flamingo.Flamingo.arch(raw["model"]["backbone"]["arch"]),
    )
    assert (structure["readout"], structure["kind"]) == ("text", "policy_head")
    assert arch["text_config"]["model_type"] == "gpt_neox"
    assert arch["clip_text_config"]["layers"] == 12


def test_the_tokenizer_gets_its_tokens(tmp_path):
    """A byte-level tokenizer like GPT-NeoX's: nothing around the text, <image> after the rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i + 1 for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    backend.decoder = decoders.ByteLevel()  # type: ignore
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config, _ = filled()
    tokenizer = hf.tokenizer(tmp_path, config)
    end = backend.get_vocab_size()
    assert [tokenizer.token_id(t) for t in flamingo.Flamingo.ADDED_TOKENS] == [end, end + 1]
    ids, mask = tokenizer.encode(vla.prompt(config).format(instruction="go"), 8)
    stop = tokenizer.token_id("<|endoftext|>")
    letters = [tokenizer.token_id(c) for c in "go"]
    assert ids[mask].tolist() == [end + 1, *letters, end, stop]
    again = type(tokenizer).from_json(tokenizer.to_json())
    assert again.token_id("<image>") == end + 1
