"""Texts beside actions: the loss itself, and that both kinds are learnt by one model."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from tests.models import tiny
from vla_jax.config import Config, CotrainConfig, resolve
from vla_jax.data.language.captions import CaptionLoader, CaptionSet
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models import vla
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.caption_loss import caption_loss
from vla_jax.models.image import preprocess
from vla_jax.models.losses import action_loss
from vla_jax.train import state
from vla_jax.train.mesh import make_mesh, shard_batch
from vla_jax.train.optim import make_optimizer
from vla_jax.train.split import train_rules
from vla_jax.train.step import make_train_step
from vla_jax.types import Actions, Batch, Captions, Observation

TEXT, SIZE, SIDES = 16, 32, ("left", "right")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 60, 230)}


def config(**changes: Any) -> Config:
    raw = quickstart.get_config()
    raw.model.structure.update({"window": 1, "chunk": 2, "text_len": 8, "cameras": ("primary",)})
    raw.model.head.update({"hidden": 32})
    raw.mesh.fsdp = 1
    with raw.unlocked():
        raw.update_from_flattened_dict(changes)
    return resolve(raw)


def captions(rows: int, seed: int = 0, images: bool = True) -> Captions:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, TEXT + 1, rows)
    mask = np.arange(TEXT) < lengths[:, None]
    text = np.where(mask, rng.integers(5, 100, (rows, TEXT)), 1).astype(np.int32)
    pixels = rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
    target = mask & (np.arange(TEXT) >= 4)
    return Captions(pixels, np.full(rows, images), text, mask, target)


def test_the_loss_is_the_next_tokens_cross_entropy_on_answers_alone():
    model, params = tiny.build(config().model)
    variables, message = {"params": params}, captions(3)
    images = jnp.asarray(message.images, jnp.float32) / 255.0
    ours = jax.jit(lambda c, x: model.apply(variables, x, c, method=caption_loss))
    total, parts = ours(message, images)

    def scores(model: Any, images: Any, text: Any, mask: Any) -> Any:
        tokens, words = model.backbone.encode_images(images), model.backbone.embed_text(text)
        embeds = jnp.concatenate([words[:, :1], tokens, words[:, 1:]], axis=1)
        observed = jnp.concatenate([mask[:, :1], jnp.ones(tokens.shape[:2], bool), mask[:, 1:]], 1)
        return model.backbone.logits(
            model.backbone(Tokens(embeds, observed, jnp.full(observed.shape, -1)))
        )

    text, mask = jnp.asarray(message.text), jnp.asarray(message.text_mask)
    apply = jax.jit(lambda *given: model.apply(variables, *given, method=scores))
    logits = np.asarray(apply(images, text, mask), np.float64)
    tokens = logits.shape[1] - TEXT
    each = []
    for row, column in zip(*np.nonzero(message.target), strict=True):
        before = logits[row, tokens + column - 1]
        each.append(np.log(np.exp(before).sum()) - before[message.text[row, column]])
    assert float(total) == pytest.approx(np.mean(each), rel=1e-5)
    assert float(parts["loss_caption"]) == float(total)

    # Questions are read but not predicted: their loss is not in it, answers depend on them.
    changed = dataclasses.replace(message, text=np.where(np.arange(TEXT) == 2, 7, message.text))
    assert float(ours(changed, images)[0]) != float(total)
    nothing = dataclasses.replace(message, target=np.zeros_like(message.target))
    assert float(ours(nothing, images)[0]) == 0.0
    # A text alone does not see the black image beside it.
    alone = dataclasses.replace(message, has_image=np.zeros(3, bool))
    assert float(ours(alone, images)[0]) == float(ours(alone, 0 * images)[0])
    assert float(ours(message, images)[0]) != float(ours(message, 0 * images)[0])


def scene(number: int) -> tuple[np.ndarray, str, int]:
    """A block somewhere on a grey table: pixels, colour, side."""
    rng = np.random.default_rng(number)
    name = list(COLOURS)[rng.integers(3)]
    row, side = rng.integers(0, 4), int(rng.integers(0, 2))
    pixels = np.full((SIZE, SIZE, 3), 128, np.uint8)
    pixels[8 * row : 8 * row + 8, 16 * side + 4 : 16 * side + 12] = COLOURS[name]
    return pixels, name, side


def windows(numbers: range) -> Batch:
    """Reach for the block: the action is where it is; the gripper closes on red."""
    n = len(numbers)
    chunk = np.zeros((n, 1, 2, 7), np.float32)
    pixels = np.zeros((n, 1, SIZE, SIZE, 3), np.uint8)
    for i, number in enumerate(numbers):
        pixels[i, 0], colour, side = scene(number)
        chunk[i, ..., :6] = 0.8 * (side - 0.5)
        # Demonstrations are never exact: this part of the loss cannot be learnt.
        chunk[i, ..., :6] += 0.2 * np.random.default_rng(number).standard_normal((1, 2, 6))
        chunk[i, ..., 6] = colour != "red"
    text = np.tile(np.array([0, 5, 6, 2, 1, 1, 1, 1], np.int32), (n, 1))
    observed = np.ones((n, 1), bool)
    return Batch(
        Observation({"primary": pixels}, {"primary": observed}, text, text != 1),
        Actions(chunk, np.ones((n, 1, 2), bool)),
        sample=np.stack([np.zeros(n), np.array(numbers)], 1).astype(np.uint32),
        dataset=np.zeros(n, np.int32),
    )


def set_up(c: Config) -> tuple[Any, state.TrainState, Any]:
    model, mesh = vla.build(c.model), make_mesh(c.mesh, jax.devices()[:1])
    optimizer = make_optimizer(c.optim, c.train.steps)

    def init(key: jax.Array) -> dict[str, Any]:
        return vla.initial_params(model, key)

    template = state.abstract(init, train_rules(c.optim), optimizer, mesh)
    current = state.create(init, optimizer, template, c.seed)
    return make_train_step(model, c, mesh, template), current, mesh


@pytest.fixture
def optimised():
    """XLA as users have it: compiled like the other tests, the sums below agree to 3e-6 only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_parts_of_texts_count_by_their_answers():
    results = []
    for parts in (1, 2):
        c = config(**{"train.accumulate": parts, "optim.clip_norm": 0.0})
        step, current, mesh = set_up(c)
        message = captions(4)
        message.target[::2] = False  # all of part 0's answers
        message.target[0, 4] = True
        batch = dataclasses.replace(windows(range(8)), captions=message)
        after, metrics = step(current, shard_batch(batch, mesh))
        moment = jax.tree.leaves(after.opt_state)
        results.append(([np.asarray(x) for x in moment], {k: float(x) for k, x in metrics.items()}))
    (full, numbers), (cut, again) = results
    assert numbers["loss_caption"] > 1
    for a, b in zip(full, cut, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)
    for name, x in numbers.items():
        assert again[name] == pytest.approx(x, abs=2e-6), name


@pytest.mark.slow
def test_captions_are_learnt_and_actions_as_well_as_without_them(tmp_path, capsys):
    steps, rows, batch_size = 300, 16, 32
    items = []
    for number in range(64):
        pixels, colour, side = scene(10_000 + number)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        talk = [
            {"from": "human", "value": "<image>\nwhat is on the table ?"},
            {"from": "gpt", "value": f"a {colour} block on the {SIDES[side]}"},
        ]
        items.append({"image": f"{number}.png", "conversations": talk})
    (tmp_path / "texts.json").write_text(json.dumps(items))
    texts = CaptionSet(tmp_path / "texts.json")
    cotrain = CotrainConfig(str(texts.path), "", rows, TEXT, "Question: {question} Answer: ")
    words = Tokenizer.build(texts.words(cotrain.prompt), 128)

    def train(with_texts: bool) -> tuple[list[dict[str, float]], float]:
        c = config(**{
            "train.steps": steps, "train.batch_size": batch_size, "optim.learning_rate": 5e-4
        })  # fmt: skip
        step, current, mesh = set_up(c)
        history = []
        with CaptionLoader(texts, words, cotrain, (SIZE, SIZE), c.seed) as loader:
            for i in range(steps):
                message = next(loader) if with_texts else None
                local = windows(range(i * batch_size, (i + 1) * batch_size))
                local = dataclasses.replace(local, captions=message)
                current, metrics = step(current, shard_batch(local, mesh))
                jax.block_until_ready(metrics)  # see train.mesh.InFlight
                if i % 10 == 0 or i >= steps - 50:
                    history.append({name: float(x) for name, x in metrics.items()})
        model = vla.build(c.model)
        held_out = jax.tree.map(jnp.asarray, windows(range(10**6, 10**6 + 512)))
        observed = jnp.asarray(held_out.observation.images["primary"])
        observation = dataclasses.replace(
            held_out.observation, images={"primary": preprocess(observed, model.image)}
        )
        prediction = jax.jit(lambda p: model.apply({"params": p}, observation))(current.params)
        total, _ = action_loss(prediction, held_out.actions, c.optim.gripper_weight)
        return history, float(total)

    alone, action_alone = train(False)
    both, action_both = train(True)
    first, last = both[0], both[-1]
    with capsys.disabled():
        print(
            f"\nheld-out action loss: actions alone {action_alone:.5f}, with texts "
            f"{action_both:.5f} ({100 * (action_both / action_alone - 1):+.1f} %); from "
            f"{alone[0]['loss_arm']:.3f}; caption loss {first['loss_caption']:.2f} -> "
            f"{last['loss_caption']:.4f}, right tokens {last['acc_caption']:.3f}"
        )
    assert last["loss_caption"] < 0.1 * first["loss_caption"]
    assert action_alone < 0.03  # 0.02 of it is the demonstrations' own spread
    assert action_both <= 1.05 * action_alone
