"""Specs from Hugging Face configs: full sizes, old and new spellings, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models import weights
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.rules import flatten


def keys(**values):
    return values


# Released models, written from their config.json, with the number of parameters their authors
# give (tied tables once).
RELEASED = {
    "gpt2": (
        "gpt2",
        keys(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024),
        124_439_808,
    ),
    "opt-125m": (
        "opt",
        keys(
            vocab_size=50272,
            hidden_size=768,
            num_hidden_layers=12,
            ffn_dim=3072,
            num_attention_heads=12,
            max_position_embeddings=2048,
            word_embed_proj_dim=768,
        ),
        125_239_296,
    ),
    "pythia-70m": (
        "gpt_neox",
        keys(
            vocab_size=50304,
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
        ),
        70_426_624,
    ),
    "llama-7b": (
        "llama",
        keys(
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=11008,
        ),
        6_738_415_616,
    ),
    "gemma-2b": (
        "gemma",
        keys(
            vocab_size=256000,
            hidden_size=2048,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            intermediate_size=16384,
        ),
        2_506_172_416,
    ),
    "gemma-2-2b": (
        "gemma2",
        keys(
            vocab_size=256000,
            hidden_size=2304,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=9216,
        ),
        2_614_341_888,
    ),
    "phi-2": (
        "phi",
        keys(
            vocab_size=51200,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=10240,
        ),
        2_779_683_840,
    ),
    "mpt-7b": (
        "mpt",
        keys(vocab_size=50432, d_model=4096, n_layers=32, n_heads=32),
        6_649_286_656,
    ),
    "qwen2-0.5b": (
        "qwen2",
        keys(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "qwen3-0.6b": (
        "qwen3",
        keys(
            vocab_size=151936,
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            tie_word_embeddings=True,
        ),
        596_049_920,
    ),
}


def shapes_of(spec):
    args = (jnp.zeros((1, 2, spec.width)), jnp.ones((1, 2), bool))
    tree = jax.eval_shape(functools.partial(Decoder(spec).init), jax.random.key(0), *args)
    return {path: leaf.shape for path, leaf in flatten(tree["params"]).items()}


@pytest.mark.parametrize("name", RELEASED)
def test_full_size(name):
    """The authors' count of parameters, and a name for each of them."""
    kind, config, count = RELEASED[name]
    spec = LANGUAGES[kind].spec(config)
    shapes = shapes_of(spec)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    rows = LANGUAGES[kind].weights(spec)
    reference = {n: None for row in rows for n in row.expand(shapes[row.targets[0]][0])}
    report = weights.check(rows, shapes, dict.fromkeys(reference, (0,)))
    assert not report.missing
    assert not report.unexpected
    assert sum("mapped twice" in line for line in report.misshaped) == 0


def llama(**more):
    return LANGUAGES["llama"].spec({**RELEASED["llama-7b"][1], **more})


def test_rotation_in_old_and_new_spelling():
    assert (
        llama().rope == llama(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}).rope
    )
    assert llama(rope_theta=5e5).rope == llama(rope_parameters={"rope_theta": 5e5}).rope
    old = llama(rope_scaling={"type": "linear", "factor": 4})
    assert old.rope is not None
    assert old.rope.stretch == 4.0
    with pytest.raises(ValueError, match="'yarn' is none of"):
        llama(rope_scaling={"rope_type": "yarn", "factor": 4})


def test_share_of_the_head_that_turns():
    config = RELEASED["phi-2"][1]
    widths = []
    for extra in (
        {},
        {"partial_rotary_factor": 0.4},
        {"rope_parameters": {"partial_rotary_factor": 0.2}},
    ):
        rope = LANGUAGES["phi"].spec({**config, **extra}).rope
        assert rope is not None
        widths.append(rope.width)
    assert widths == [40, 32, 16]


def test_local_layers():
    gemma2 = LANGUAGES["gemma2"].spec(RELEASED["gemma-2-2b"][1])
    assert gemma2.window == 4096
    assert gemma2.local == (True, False) * 13
    config = RELEASED["qwen2-0.5b"][1]
    assert LANGUAGES["qwen2"].spec(config).window is None
    windowed = {**config, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 20}
    spec = LANGUAGES["qwen2"].spec(windowed)
    assert spec.window == 32
    assert spec.local == (False,) * 20 + (True,) * 4
    listed = ["full_attention", "sliding_attention"] * 12
    spec = LANGUAGES["qwen2"].spec({**windowed, "layer_types": listed})
    assert spec.local == (False, True) * 12


def test_gemma_takes_no_activation_from_early_files():
    """Early files say "gelu" under a key the model did not read."""
    for extra in ({"hidden_act": "gelu"}, {"hidden_activation": None}, {}):
        spec = LANGUAGES["gemma"].spec({**RELEASED["gemma-2b"][1], **extra})
        assert spec.block.activation == "gelu_pytorch_tanh"
        assert spec.embed_scale == 2048**0.5


def test_null_switches_off_a_cap():
    config = RELEASED["gemma-2-2b"][1]
    spec = LANGUAGES["gemma2"].spec(config)
    assert (spec.block.soft_cap, spec.logit_cap) == (50.0, 30.0)
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = LANGUAGES["gemma2"].spec({**config, **off})
    assert (spec.block.soft_cap, spec.logit_cap) == (None, None)


def test_refusals_name_every_key():
    config = {**RELEASED["opt-125m"][1], "do_layer_norm_before": False, "word_embed_proj_dim": 512}
    with pytest.raises(ValueError, match="do_layer_norm_before") as error:
        LANGUAGES["opt"].spec(config)
    assert "word_embed_proj_dim: 512; only 768 is supported" in str(error.value)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        LANGUAGES["gpt2"].spec({**RELEASED["gpt2"][1], "scale_attn_by_inverse_layer_idx": True})
