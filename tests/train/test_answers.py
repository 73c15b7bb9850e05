"""Texts that say a chunk: made by the loader, with tokenizers that the run brings or inherits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import bridge_smoke
from configs.tiny import ARCHS
from launch.fit_fast import draw_chunks
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.convert.start import Start
from vla_jax.data.errors import DataError
from vla_jax.data.language.fast_text import AnswerWriter, FastText
from vla_jax.data.mixture import open_datasets
from vla_jax.data.units.fast import FastTokenizer
from vla_jax.models import vla
from vla_jax.train import resume
from vla_jax.train.inputs import open_inputs

DATA = Path(__file__).parents[1] / "fixtures/bridge_dataset/1.0.0"
CHUNK, VOCAB = 4, 320


def config(cache: Path, **changes: Any) -> Config:
    raw = bridge_smoke.get_config(str(DATA))
    arch = {**ARCHS["paligemma"], "text_config": {**ARCHS["paligemma"]["text_config"]}}
    arch["text_config"]["vocab_size"] = VOCAB
    raw.model.backbone = {"name": "paligemma", "hf_dir": "", "arch": arch}
    raw.model.structure.update(
        {"kind": "discrete", "window": 1, "chunk": CHUNK, "text_len": 24, "cameras": ("primary",)}
    )
    raw.model.head.kind = "fast"
    raw.model.fast.update({"prompt": "pi0", "length": 40})
    raw.data.cache_dir = str(cache)
    raw.train.batch_size = 16
    raw.update_from_flattened_dict(changes)
    return resolve(raw)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    c = config(folder)
    mixture = open_datasets(c.data, c.model.structure, c.model.action_dim, "train")
    FastTokenizer.fit(draw_chunks(mixture, 300, 0), 200).save(folder / "fast")
    return folder


def opened(c: Config, meta: Any = None) -> Any:
    return open_inputs(c, vla.build(c.model), Start(c.model, None, meta), meta or {})


def test_the_loader_writes_what_says_the_chunk(fitted):
    inputs = opened(config(fitted, **{"model.fast.dir": str(fitted / "fast")}))
    text = FastText.from_json(inputs.config.model.fast.code)
    # Words come first, then FAST tokens up to the vocabulary's end.
    assert text.token_end == VOCAB
    assert inputs.tokenizer.vocab_size <= text.first
    assert text.stop == inputs.tokenizer.token_id("</s>")
    with inputs.batches(0) as batches:
        batch = next(batches)
    assert batch.actions.written.shape == (16, 40)
    for ids, chunk in zip(batch.actions.written, batch.actions.chunk[:, 0], strict=True):
        content = text.read(ids[ids >= 0], CHUNK, 7)
        content[:, -1] = (content[:, -1] + 1) / 2
        assert np.abs(content - chunk).max() < 0.15


def test_a_resumed_run_needs_no_folder(fitted):
    inputs = opened(config(fitted, **{"model.fast.dir": str(fitted / "fast")}))
    meta = inputs.meta() | {"config": to_dict(inputs.config)}
    later = resume.as_begun(config(fitted, **{"model.fast.dir": "gone"}), meta["config"])
    assert resume.check_resume(meta["config"], to_dict(later)) == []
    again = opened(later, meta)
    assert again.config.model.fast.code == inputs.config.model.fast.code


def test_what_is_missing_or_does_not_fit_is_said(fitted):
    with pytest.raises(ConfigError, match=r"model\.fast\.dir: name the folder"):
        opened(config(fitted))
    with pytest.raises(ConfigError, match=r"model\.fast\.dir: .*No such file"):
        opened(config(fitted, **{"model.fast.dir": str(fitted / "none")}))
    text = FastText(FastTokenizer.from_dir(fitted / "fast"), VOCAB, (1,), (2,), 3)
    writer = AnswerWriter(text, 5, gripper=True)
    chunk = np.random.default_rng(0).uniform(-1, 1, (CHUNK, 7))
    with pytest.raises(DataError, match=r"model\.fast\.length: .* more than the 5 columns"):
        writer(chunk)
    # Far beyond the fitted range: written as its end.
    far = dataclasses.replace(writer, length=60)(np.full((CHUNK, 7), 40.0))
    assert np.isfinite(text.read(far[far >= 0], CHUNK, 7)).all()
