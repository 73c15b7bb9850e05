"""Files beside the weights: copied, carried inside the checkpoint, or written from the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from launch import convert
from vla_jax.convert import store
from vla_jax.convert.hf import files as hf_files
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.image import ImageSpec

TINY = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CODE = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}})


def words(*texts: str) -> str:
    return Tokenizer.build(texts, 64).to_json()


def bare(*specials: str) -> str:
    """A tokenizer like GPT-2's: special tokens, none of them put around a text."""
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return backend.to_str()


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_small_files_outlive_their_folder(tmp_path):
    source, run, out = (tmp_path / name for name in ("hf", "run", "out"))
    shutil.copytree(TINY, source)
    texts = {
        "tokenizer.json": words("a b"),
        "tokenizer_config.json": '{"model_max_length": 77, "pad_token": "<pad>"}',
        "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor", "size": 9}',
        "chat_template.jinja": "{{ messages }}",
        "processor_config.json": CODE,
        "modeling_x.py": "print()",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    assert convert.main(["import-hf", str(source), str(run), "--set=model.head.hidden=8"]) == 0
    origin = store.Stored(run).meta["origin"]
    assert origin["vlm_config"] == read(source / "config.json")
    assert "modeling_x.py" not in origin["files"]
    assert convert.main(["export-hf", str(run), str(out)]) == 0
    assert all((out / name).read_text() == text for name, text in texts.items())
    shutil.rmtree(source)
    assert convert.main(["export-hf", str(run), str(out), "--overwrite"]) == 0
    retained = set(texts) - {"processor_config.json", "modeling_x.py", "tokenizer.json"}
    assert all((out / name).read_text() == texts[name] for name in retained)
    assert not (out / "modeling_x.py").exists()
    # Its code is gone, so it would only stand in the way.
    assert not (out / "processor_config.json").exists()
    assert Tokenizer.from_dir(out).to_json() == texts["tokenizer.json"]


def test_only_known_names_are_written(tmp_path):
    texts = {"../x.json": "{}", "surprise.py": "", "chat_template.jinja": "{{ m }}"}
    hf_files.place(None, texts, tmp_path)
    hub = json.dumps({"auto_map": {"AutoProcessor": "owner/name--processing_x.Processor"}})
    hf_files.place(None, {"processor_config.json": hub}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja", "processor_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "config", "roles"),
    [
        (
            words("a b"),
            {"bos_token_id": 2},
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ),
        (
            bare("<|endoftext|>"),
            {"text_config": {"bos_token_id": 2, "eos_token_id": [2, 3]}},
            {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "a"},
        ),
        (bare("<x>", "<y>"), {"eos_token_id": 3, "pad_token_id": None},
         {"eos_token": "<y>", "unk_token": "a"}),
        (bare(), {"bos_token_id": 0}, {"unk_token": "a"}),
    ],
    ids=["template", "ids", "few", "none"],
)  # fmt: skip
def test_special_tokens(tmp_path, tokenizer, config, roles):
    hf_files.write_tokenizer(tokenizer, config, tmp_path)
    assert read(tmp_path / "special_tokens_map.json") == roles
    settings = read(tmp_path / "tokenizer_config.json")
    assert {key: settings[key] for key in roles} == roles
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read(tmp_path / "tokenizer.json")["padding"] is None


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("x")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    hf_files.write_tokenizer(words("a"), {}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen.tiktoken", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "resample": 3,
              "size": {"height": 28, "width": 42}}),
        ({"fit": "crop", "shortest": 64, "resample": "lanczos"},
         {"do_center_crop": True, "size": {"shortest_edge": 64}, "resample": 1,
          "crop_size": {"height": 28, "width": 42}}),
        ({"fit": "pad", "width": 28}, {"image_processor_type": "LlavaImageProcessor",
                                       "do_pad": True, "size": {"shortest_edge": 28}}),
    ],
    ids=["squash", "crop", "pad"],
)  # fmt: skip
def test_image_processors(spec, expected):
    options: dict[str, Any] = {"size": 28, "width": 42, **spec}
    preprocessor = hf_files.preprocessor(ImageSpec(**options, mean=MEAN, std=STD))
    assert {key: preprocessor[key] for key in expected} == expected
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == (list(MEAN), list(STD))


def test_processors_that_count_image_tokens(tmp_path):
    """As LLaVA's: (tokens of the tower - 1 dropped) in an image of 2 x 3 patches."""
    image = ImageSpec(size=28, width=42, mean=MEAN, std=STD)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"patch_size": 14},
        "vision_feature_select_strategy": "default",
    }
    hf_files.write_processor(image, 6, config, tmp_path)
    assert read(tmp_path / "processor_config.json") == {
        "patch_size": 14, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    content = read(tmp_path / "preprocessor_config.json")
    assert content["image_seq_length"] == 6
    assert content["processor_class"] == "LlavaProcessor"


def test_processors_that_cut_patches(tmp_path):
    image = ImageSpec(size=56, mean=MEAN, std=STD)
    vision = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": vision}
    hf_files.write_processor(image, 4, config, tmp_path)
    content = read(tmp_path / "preprocessor_config.json")
    assert content["image_processor_type"] == "Qwen2VLImageProcessor"
    assert content["size"] == {"shortest_edge": 3136, "longest_edge": 3136}
    assert (content["patch_size"], content["merge_size"], content["temporal_patch_size"]) == (
        14,
        2,
        2,
    )
