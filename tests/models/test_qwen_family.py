"""What is special about Qwen2-VL and later: positions, marks, deep features, files, prompts."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from configs import qwen3_vl_ph
from configs.tiny import ARCHS
from tests import arrays
from tests.models import tiny
from tests.parity.qwen_next import frames
from vla_jax.config import resolve
from vla_jax.convert.hf import source as hf
from vla_jax.models import image, vla, weights
from vla_jax.models.backbones import BACKBONES, qwen_family
from vla_jax.models.backbones.base import Tokens
from vla_jax.rules import flatten

FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def counted(valid, place, grid, start=0):
    """The rule, one token after the other."""
    collected, current = [], start
    rows, columns = grid
    for present, at in zip(valid, place, strict=True):
        patch = at - 1
        inside = 0 <= patch < rows * columns
        row, column = divmod(patch, columns) if inside else (0, 0)
        collected.append((current, current + row, current + column))
        if present and not inside:
            current += 1
        elif present and patch == rows * columns - 1:
            current += max(rows, columns)
    return np.array(collected).T, current


@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (1, 4)])
def test_positions(grid):
    """Texts and several images in a row, padding anywhere, at once and in parts."""
    rng, count = np.random.default_rng(0), grid[0] * grid[1] + 2
    rows = []
    for _ in range(4):
        place, valid = [], []
        for _ in range(3):
            text = rng.integers(1, 5)
            place += [-1] * text + list(range(count))
            valid += list(rng.random(text) < 0.7) + [bool(rng.random() < 0.7)] * count
        rows.append((np.array(valid + [True] * 20)[:36], np.array(place + [-1] * 20)[:36]))
    valid, place = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    positions = jax.jit(qwen_family.positions, static_argnums=2)
    got, following = positions(valid, place, grid)
    for i, row in enumerate(rows):
        expected, current = counted(row[0], row[1], grid)
        np.testing.assert_array_equal(np.asarray(got)[:, i, row[0]], expected[:, row[0]])
        assert following[i] == current
    parts, start = [], jnp.zeros(len(rows), jnp.int32)
    for cut in (slice(0, 5), slice(5, 6), slice(6, 36)):
        part, start = positions(valid[:, cut], place[:, cut], grid, start)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), got)


@pytest.mark.parametrize("structure", ["interleaved", "video"])
def test_positions_of_a_window(structure):
    """Two cameras a step and the first step missing: positions are those of what is there."""
    model = vla.build(tiny.config(structure, "mlp", backbone="qwen2_vl"))
    params = random_params(model)
    observation, valid = tiny.observe(), jnp.array([[False, True, True], [True, True, True]])

    def tokens_of(m):
        return m.sequence(m.encode(observation), valid, observation).tokens

    tokens = jax.jit(lambda p: model.apply({"params": p}, method=tokens_of))(params)
    got, _ = qwen_family.positions(tokens.valid, tokens.place, (2, 2))
    for i, present in enumerate(np.asarray(tokens.valid)):
        marks = np.asarray(tokens.place)[i, present]
        assert (marks == 1).sum() == 2 * valid[i].sum()  # the images that exist
        expected, _ = counted(np.ones(len(marks), bool), marks, (2, 2))
        np.testing.assert_array_equal(np.asarray(got)[:, i, present], expected)


def random_params(model):
    """Without compiling what would make them."""
    shapes = jax.eval_shape(lambda k: vla.initial_params(model, k), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def bound(name):
    kind = BACKBONES[name]
    model = vla.build(tiny.config("policy_head", "lstm", backbone=name))
    variables = {"params": random_params(model)["backbone"]}

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, *args):
        return kind(model.arch, "none").apply(variables, *args, method=method)

    return kind(model.arch), run


@pytest.mark.parametrize("name", FAMILY)
def test_images_carry_their_marks(name):
    backbone, run = bound(name)
    size = backbone.config["image_size"]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, size, size, 3)), jnp.float32)
    tokens = run("encode_images", images)
    assert tokens.shape == (2, backbone.image_tokens, backbone.token_width)
    marks = run("embed_text", jnp.array([[3, 4]] * 2))
    np.testing.assert_array_equal(tokens[:, [0, -1]], marks)


def test_any_grid():
    """The tower takes what it is given, and frames that differ."""
    _, run = bound("qwen2_vl")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 64, 3)), jnp.float32)
    tokens = run("encode_images", images)
    assert tokens.shape[1] == 2 * 4 + 2
    # A still image stands for both frames of a token.
    video = jnp.stack([images, images], axis=1)
    np.testing.assert_allclose(run("encode_images", video), tokens, atol=1e-5)
    video = jnp.stack([images, -images], axis=1)
    assert np.abs(run("encode_images", video) - tokens).max() > 0.1
    with pytest.raises(ValueError, match="cannot be merged in squares of 2"):
        run("encode_images", images[:, :, :40])


def test_deep_features_reach_the_decoder():
    """... from the columns they stand in, forwards alone; text has none."""
    backbone, run = bound("qwen3_vl")
    d = backbone.width
    assert backbone.token_width == 2 * d
    x = run("embed_text", jnp.arange(5, 13)[None])
    assert not x[..., d:].any()
    tokens = Tokens(x, jnp.ones((1, 8), bool), jnp.full((1, 8), -1))
    plain = run("__call__", tokens)
    deep = run("__call__", tokens._replace(embeds=x.at[:, 4, d:].set(1.0)))
    changed = np.abs(np.asarray(deep - plain)).max(axis=-1)[0] > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_reads_config_json_of_every_age():
    kind = BACKBONES["qwen2_vl"]
    # Qwen2-VL-7B as released: flat, rotation in loose keys.
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "max_window_layers": 28, "use_sliding_window": False,
    }  # fmt: skip
    sections = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "in_chans": 3}
    old = {
        "model_type": "qwen2_vl", "tie_word_embeddings": False, "rope_theta": 2e6,
        "rope_scaling": sections, "vision_config": vision, **text,
    }  # fmt: skip
    rotation = {"rope_theta": 2e6, "rope_type": "default", **sections}
    new = {
        "model_type": "qwen2_vl", "vision_config": vision,
        "text_config": {**text, "rope_parameters": rotation},
    }  # fmt: skip
    specs = [kind(kind.arch(config, strict=False)).text_spec for config in (old, new)]
    assert specs[0] == specs[1]
    assert specs[0].layers == 28
    assert not specs[0].tied
    assert specs[0].rope is not None
    assert (specs[0].rope.theta, specs[0].rope.sections) == (2e6, (16, 24, 24))
    nested = {**new, "text_config": {**new["text_config"], "tie_word_embeddings": True}}
    assert kind.arch(nested, strict=False)["tie_word_embeddings"]
    stretched = {**old, "rope_scaling": {**sections, "type": "yarn", "factor": 4}}
    with pytest.raises(ValueError, match="'yarn' is none of"):
        _ = kind(kind.arch(stretched, strict=False)).text_spec


def test_says_all_that_does_not_fit():
    kind = BACKBONES["qwen3_vl"]
    with pytest.raises(ValueError, match="image_size: 200") as error:
        kind.arch({"image_size": 200, "text_config": {"hidden_size": 64, "vocab_size": 500}})
    for words in ("multiple of 32", "out_hidden_size: 2048", "vision_end_token_id: 151653"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'mrope_section'"):
        kind.arch({"text_config": {"rope_parameters": {"mrope_sections": (1,)}}})


def later(key):
    """A name as transformers has it since 4.52."""
    if key.startswith("visual."):
        return "model." + key
    if key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + key[len("model.") :]
    return key


@pytest.mark.parametrize(
    ("name", "tied"), [("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", False)]
)
def test_a_folder_in_old_and_new_names(tmp_path, name, tied):
    """What config.json says counts, not the released architecture; both spellings load."""
    kind = BACKBONES[name]
    arch = kind.arch({**ARCHS[name], "tie_word_embeddings": tied})
    config = tiny.config("policy_head", "lstm", backbone=name, **{"backbone.arch": {}})
    model = vla.build(config, arch)
    params = flatten(random_params(model))
    rows = kind(arch).weight_map()
    reference = {}
    for row in weights.prefixed(rows, "", "backbone/"):
        if not row.alias:
            reference |= arrays.to_theirs(row, params)
    shapes = {path: x.shape for path, x in params.items()}
    for folder, spelled in (("old", str), ("new", later)):
        (tmp_path / folder).mkdir()
        files = {spelled(key): x for key, x in reference.items()}
        save_file(files, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(arch))
        loaded = hf.load(tmp_path / folder, config, shapes, lambda _, x: x)
        assert set(loaded) == {path for path in params if path.startswith("backbone/")}
        for path, x in loaded.items():
            np.testing.assert_array_equal(x, params[path])


@pytest.mark.parametrize("name", FAMILY)
def test_pixels_are_those_of_the_original_processor(name):
    """For images that it leaves at their size: values, patches, and a frame for each of two."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    kind = BACKBONES[name]
    vision = kind.RELEASED["vision_config"]
    side = 2 * vision["patch_size"] * vision["spatial_merge_size"]
    spec = kind(kind.arch({"image_size": side})).image_spec
    # preprocessor_config.json of the released models; of the other two as the class has it.
    settings: Any = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name == "qwen3_vl" else {}
    settings |= {"patch_size": vision["patch_size"]}
    settings |= {"size": {"shortest_edge": side**2, "longest_edge": side**2}}
    processor = Qwen2VLImageProcessorPil(**settings)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    out = processor(Image.fromarray(pixels), return_tensors="np")
    _, rows, columns = np.asarray(out["image_grid_thw"])[0].tolist()
    expected = frames(np.asarray(out["pixel_values"]), (rows, columns), vision)
    got = image.preprocess(jnp.asarray(pixels), spec)
    np.testing.assert_allclose(np.stack([got, got])[None], expected, atol=2e-6)


def small_tokenizer(folder):
    """Byte by byte, with Qwen's way to split and its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], byte_fallback=False))
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    backend.add_special_tokens([AddedToken(t, special=True) for t in special[:3]])
    backend.add_tokens([AddedToken(t, normalized=False) for t in special[3:]])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return backend


def test_prompts_are_turns_of_the_chat(tmp_path):
    """Three tokens before the images, nothing added, the assistant's turn is open at the end."""
    backend = small_tokenizer(tmp_path)
    discrete = tiny.config("discrete", "detokenizer", "qwen3_vl")
    tokenizer = hf.tokenizer(tmp_path, discrete)
    newline = backend.encode("\n").tokens[0]
    for template in (qwen_family.QwenFamily.PROMPT, vla.prompt(discrete)):
        ids, mask = tokenizer.encode(template.format(instruction="pick it up"), 128)
        tokens = [backend.id_to_token(i) for i in ids[mask]]
        assert tokens[: qwen_family.QwenFamily.LAYOUT.bos] == ["<|im_start|>", "user", newline]
        assert tokens[-5:] == ["<|im_end|>", newline, "<|im_start|>", "assistant", newline]
        assert (ids[~mask] == backend.token_to_id("<|endoftext|>")).all()


def test_captions_are_chats(tmp_path):
    """What is predicted is the answer and that it ends."""
    backend = small_tokenizer(tmp_path)
    tokenizer = hf.tokenizer(tmp_path, tiny.config("policy_head", "lstm", "qwen2_vl"))
    start, end = vla.ends(tiny.config("policy_head", "lstm", "qwen2_vl"))
    asked = resolve(qwen3_vl_ph.get_config()).data.cotrain.prompt.format(question="what?")
    parts = [(start, False), (asked, False), ("a cup", True), (end, True)]
    ids, mask, target = tokenizer.encode_answers(parts, 64)
    assert backend.decode(ids[mask].tolist(), skip_special_tokens=False) == (
        "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\na cup<|im_end|>"
    )
    assert backend.decode(ids[target].tolist(), skip_special_tokens=False) == "a cup<|im_end|>"


def test_images_stand_inside_the_turn():
    model = vla.build(tiny.config("policy_head", "lstm", backbone="qwen3_vl"))
    params = random_params(model)
    observation = tiny.observe(window=1)
    valid = jnp.ones((2, 1), bool)

    def tokens_of(m):
        return m.sequence(m.encode(observation), valid, observation).tokens

    tokens = jax.jit(lambda p: model.apply({"params": p}, method=tokens_of))(params)
    expected = [-1] * 3 + list(range(6)) * 2 + [-1] * (tiny.TEXT - 3 + 1)
    assert tokens.place[0].tolist() == expected
    # The action token is the last: the assistant's first.
    assert tokens.valid.sum(1).tolist() == [7 + 12 + 1, 9 + 12 + 1]
