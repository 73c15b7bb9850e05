import json

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.config import ConfigError, LanguageConfig
from vla_jax.data.language.instructions import Instructions
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.sampler import Stream, uniform
from vla_jax.data.spec import Trajectory
from vla_jax.data.standardize import instructions

PLAIN = LanguageConfig("", 0.5, 0.0)
SAMPLES = np.arange(6000, dtype=np.uint64)


class Said:
    """Trajectory 0 is told "a", "b" or "c", trajectory 1 only "b"."""

    def __init__(self):
        self.instructions = ["b", "a", "c"]
        self.text = np.array([1, 0, 2, 0], np.int32)
        self.text_starts = np.array([0, 3, 4])


@pytest.fixture
def paraphrases(tmp_path):
    path = tmp_path / "paraphrases.json"
    path.write_text(json.dumps({"b": ["B", "bee", "B"], "unknown": ["x"]}))
    return str(path)


def said(config, trajectory, train=True, seed=1):
    texts = Instructions([Said()], config, train)
    codes = texts.choose(0, np.full(len(SAMPLES), trajectory), SAMPLES, seed)
    return np.array(texts.texts)[codes]


def shares(told):
    return {str(t): (told == t).mean() for t in np.unique(told)}


def test_every_instruction_is_as_likely():
    result = shares(said(PLAIN, 0))
    assert set(result) == {"a", "b", "c"}
    assert all(
        abs(fraction - 1 / 3) < 0.03 for fraction in result.values()
    )  # 5 standard deviations
    assert shares(said(PLAIN, 1)) == {"b": 1}


def test_paraphrases_and_dropout(paraphrases):
    result = shares(said(LanguageConfig(paraphrases, 0.4, 0.1), 1))
    expected = {"b": 0.9 * 0.6, "B": 0.9 * 0.2, "bee": 0.9 * 0.2, "": 0.1}
    assert set(result) == set(expected)
    assert all(abs(result[text] - fraction) < 0.03 for text, fraction in expected.items())
    message = said(LanguageConfig(paraphrases, 1.0, 0.0), 0)
    assert not (message == "b").any()


def test_what_is_told_depends_on_seed_and_sample_number_alone(paraphrases):
    config = LanguageConfig(paraphrases, 0.5, 0.2)
    texts = Instructions([Said()], config, True)
    full = texts.choose(0, np.zeros(6000, int), SAMPLES, 7)
    part = np.random.default_rng(0).permutation(6000)[:100]
    np.testing.assert_array_equal(texts.choose(0, np.zeros(100, int), SAMPLES[part], 7), full[part])
    assert (texts.choose(0, np.zeros(6000, int), SAMPLES, 8) != full).mean() > 0.3


def test_evaluation_is_told_the_first_instruction(paraphrases):
    config = LanguageConfig(paraphrases, 1.0, 0.5)
    assert shares(said(config, 0, train=False)) == {"a": 1}
    assert Instructions([Said()], config, False).texts == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected {instruction"),
        ('{"b": [], "a": ["x"]}', r"not a list of texts: \['b'\] \(1 in all\)"),
        ('{"b": ["  "]}', "not a list of texts"),
        ('{"d": ["x"]}', r"none of its 1 texts is one of \['a', 'b', 'c'\]"),
    ],
)
def test_bad_paraphrases(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Instructions([Said()], LanguageConfig(str(path), 0.5, 0.0), True)
    with pytest.raises(ConfigError, match="No such file"):
        Instructions([Said()], LanguageConfig(str(tmp_path / "q"), 0.5, 0.0), True)


def test_instructions_of_an_episode():
    steps = np.array(["", "late", "later"], object)
    action = np.zeros((3, 7), np.float32)

    def found(language, **keep):
        return instructions(Trajectory(action, language, **keep))

    assert found("go") == ["go"]
    assert found("  ") == []
    assert found(steps) == ["late"]
    assert found(steps, keep=slice(0, 1)) == []
    assert found(("go", "", steps, "go")) == ["go", "late"]


def test_in_a_batch(tmp_path, data_config, structure):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"task 1": ["second", "middle"]}))
    folder = write_calvin(tmp_path / "c" / "1.0.0", [7, 3, 11])
    language = {"paraphrases": str(path), "paraphrase": 0.5, "dropout": 0.2}
    config = data_config(("calvin", folder, 1.0), language=language)
    mixture = open_datasets(config, structure(), 7, "train")
    assert mixture.instructions == ["", "middle", "second", "task 0", "task 1"]
    recorded = set()

    def encode(text):
        return np.array([mixture.instructions.index(text)], np.int32), np.ones(1, bool)

    with Loader(mixture, encode, 32, 3) as loader:
        for _ in range(8):
            batch = next(loader)
            episode = batch.observation.images["primary"][:, -1, 0, 0, 0]
            recorded |= {
                (int(e), int(t)) for e, (t,) in zip(episode, batch.observation.text, strict=True)
            }
    assert recorded == {(0, 0), (0, 3), (1, 0), (1, 1), (1, 2), (1, 4)}
    held_out = open_datasets(config, structure(), 7, "val")
    assert held_out.instructions == ["task 2"]


def test_uniform_numbers():
    u = uniform(3, Stream.FEW_SHOT, SAMPLES, 4)
    assert u.shape == (6000, 4)
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.06
    for column in u.T:
        counts = np.bincount((column * 50).astype(int), minlength=50)
        assert ((counts - 120) ** 2 / 120).sum() < 90  # chi square, 49 degrees: 99.97 %
    remaining = (Stream.FEW_SHOT, 4), (Stream.INSTRUCTIONS, 3)
    for other in (uniform(seed, stream, SAMPLES, 1) for stream, seed in remaining):
        assert abs(np.corrcoef(other[:, 0], u[:, 0])[0, 1]) < 0.06
    np.testing.assert_array_equal(uniform(3, Stream.FEW_SHOT, SAMPLES[[5]], 2), u[[5], :2])
