import atexit
import json
import threading

import jax
import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.data import errors
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.rlds import records

LENGTHS = [7, 3, 11, 5]


def encode(text):
    ids = np.full(16, 1, np.int32)
    ids[: len(text)] = [ord(c) for c in text[:16]]
    return ids, np.arange(16) < len(text)


@pytest.fixture
def mixture(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), normalization="none", val_fraction=0.0)
    return open_datasets(config, structure(cameras=("primary", "wrist")), 7, "train")


def take(mixture, count, **options):
    with Loader(mixture, encode, 8, 3, **options) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_batch_keeps_the_contract(mixture):
    (batch,) = take(mixture, 1)
    observation = batch.observation
    assert {k: (v.shape, v.dtype.name) for k, v in observation.images.items()} == {
        "primary": ((8, 3, 24, 24, 3), "uint8"),
        "wrist": ((8, 3, 8, 12, 3), "uint8"),
    }
    assert observation.image_mask["wrist"].shape == (8, 3)
    assert (observation.text.shape, observation.text.dtype.name) == ((8, 16), "int32")
    assert (batch.actions.chunk.shape, batch.actions.chunk.dtype.name) == ((8, 3, 4, 7), "float32")
    assert (batch.actions.mask.shape, batch.actions.mask.dtype.name) == ((8, 3, 4), "bool")
    assert (batch.sample.shape, batch.sample.dtype.name) == ((8, 2), "uint32")
    assert batch.sample.tolist() == [[0, n] for n in range(8)]
    assert (batch.dataset.shape, batch.dataset.dtype.name) == ((8,), "int32")
    assert observation.proprio is None
    assert np.isin(batch.actions.chunk[..., 6], [0, 1]).all()


def test_states_belong_to_their_frames(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), normalization="none", val_fraction=0.0)
    mixture = open_datasets(config, structure(proprio=15), 7, "train")
    statistics, recorded = mixture.statistics["calvin"]["proprio"], mixture.datasets[0].proprio
    assert recorded is not None
    assert recorded.shape == (sum(LENGTHS), 15)
    assert np.abs(recorded).max() == 1  # clipped at the 1 % and 99 % quantiles
    assert len(statistics["q01"]) == 15
    starts = np.cumsum([0, *LENGTHS])
    for batch in take(mixture, 4):
        observation = batch.observation
        pixels = observation.images["primary"]
        episode, step = pixels[..., 0, 0, 0].astype(int), pixels[..., 0, 0, 1].astype(int)
        np.testing.assert_array_equal(observation.proprio, recorded[starts[episode] + step])


def test_sentences_go_with_their_text(mixture):
    vectors = {f"task {i}": np.full(3, i, np.float32) for i in range(3)}
    for batch in take(mixture, 3, sentences=vectors):
        observation = batch.observation
        texts = [
            "".join(map(chr, t[m]))
            for t, m in zip(observation.text, observation.text_mask, strict=True)
        ]
        np.testing.assert_array_equal(observation.sentence, [vectors[text] for text in texts])


def test_pixels_text_and_actions_belong_together(mixture):
    # Pixels carry (episode, step), and so do the first two action dimensions (in hundredths).
    visited = set()
    for batch in take(mixture, 12):
        pixels = batch.observation.images["primary"]
        assert (pixels == pixels[:, :, :1, :1]).all()
        episode, step = pixels[..., 0, 0, 0].astype(int), pixels[..., 0, 0, 1].astype(int)
        for b in range(8):
            end = step[b, -1]
            visited.add((episode[b, -1], end))
            text = "".join(map(chr, batch.observation.text[b][batch.observation.text_mask[b]]))
            assert text == f"task {episode[b, 0] % 3}"
            for j in range(3):
                frame = end - 2 + j
                assert batch.observation.image_mask["primary"][b, j] == (frame >= 0)
                assert step[b, j] == max(frame, 0)
                for k in range(4):
                    valid = frame >= 0 and frame + k < LENGTHS[episode[b, 0]]
                    assert batch.actions.mask[b, j, k] == valid
                    if valid:
                        result = batch.actions.chunk[b, j, k, :2] * 100
                        np.testing.assert_allclose(result, [episode[b, j], frame + k], atol=1e-4)
    assert visited == {(e, t) for e, length in enumerate(LENGTHS) for t in range(length)}


def test_left_padding_can_be_left_out(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.0, left_pad=False)
    mixture = open_datasets(config, structure(window=4), 7, "train")
    assert mixture.num_windows == 4 + 0 + 8 + 2
    for batch in take(mixture, 4):
        assert batch.observation.image_mask["primary"].all()
    with pytest.raises(errors.DataError, match=r"as long as the window 12"):
        open_datasets(config, structure(window=12), 7, "train")


def test_segments_hide_the_start(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.0, windows="segment")
    mixture = open_datasets(config, structure(window=3), 7, "train")
    assert mixture.num_windows == 3 * sum(LENGTHS)
    with Loader(mixture, encode, 1, 0, shuffle=False) as loader:
        batches = list(loader)
    number = 0
    for length in LENGTHS:
        for end in range(length):
            for hidden in range(3):
                observation, mask = batches[number].observation, batches[number].actions.mask[0]
                first = max(end - 2 + hidden, 0)
                steps = observation.images["primary"][0, :, 0, 0, 1].tolist()
                assert steps == [max(end - 2 + j, first) for j in range(3)]
                expected = [end - 2 + j >= first for j in range(3)]
                assert observation.image_mask["primary"][0].tolist() == expected
                assert mask.any(-1).tolist() == expected
                number += 1


def test_steps_that_are_padding_can_be_supervised(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.0, padded_rows=True)
    mixture = open_datasets(config, structure(window=3), 7, "train")
    with Loader(mixture, encode, 1, 0, shuffle=False) as loader:
        first = next(loader)
    assert first.actions.mask[0].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert first.observation.image_mask["primary"][0].tolist() == [False, False, True]


def test_random_goals_cut_the_chunks(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), normalization="none", random_goal=True)
    mixture = open_datasets(config, structure(window=1, chunk=10), 7, "train")
    plain = data_config(("calvin", calvin, 1.0), normalization="none")
    complete = open_datasets(plain, structure(window=1, chunk=10), 7, "train")
    cuts = set()
    for a, b in zip(take(mixture, 40), take(complete, 40), strict=True):
        ours, all_of_it = a.actions.mask[:, 0], b.actions.mask[:, 0]
        assert (ours <= all_of_it).all()
        left, full = ours.sum(-1), all_of_it.sum(-1)
        assert (left >= np.minimum(full, 2)).all()  # the goal is a later frame, if there is one
        cuts |= set(zip(full.tolist(), left.tolist(), strict=True))
        np.testing.assert_array_equal(
            a.observation.images["primary"], b.observation.images["primary"]
        )
    assert {left for full, left in cuts if full == 6} == set(range(2, 7))
    assert not open_datasets(config, structure(), 7, "val").random_goal


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A mixture of three with everything drawn that can be drawn."""
    from configs.base import get_config
    from vla_jax.config import resolve

    root = tmp_path_factory.mktemp("everything")
    c = get_config()
    entries = [("a", [7, 3, 11, 5], 1.0), ("b", [9, 4], 0.5), ("c", [20], 2.0)]
    c.data.datasets = tuple(
        {"spec": "calvin", "dir": str(write_calvin(root / n / "1.0.0", lengths, i)), "weight": w}
        for i, (n, lengths, w) in enumerate(entries)
    )
    c.data.cache_dir = str(root / "cache")
    c.data.update({"val_fraction": 0.0, "block": 256})
    c.data.parity.update({"windows": "segment", "random_goal": True})
    (root / "p.json").write_text(json.dumps({"task 0": ["first"], "task 1": ["x", "y"]}))
    c.data.language.update({"paraphrases": str(root / "p.json"), "dropout": 0.1})
    c.model.structure.update({"window": 3, "chunk": 4, "proprio": 15})
    config = resolve(c)

    def run():
        return open_datasets(config.data, config.model.structure, 7, "train")

    return run


def test_resuming_gives_the_same_next_thousand_samples(everything):
    mixture = everything()
    with Loader(mixture, encode, 8, 3) as loader:
        for _ in range(37):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [next(loader) for _ in range(125)]
    assert state["samples"] == 296
    with Loader(everything(), encode, 8, 3, start=296) as loader:
        for batch in expected:
            assert_equal(next(loader), batch)
    # And the whole state is that one integer: the rest is checked, not used.
    for a, b in zip(take(mixture, 2, start=state), expected, strict=False):
        assert_equal(a, b)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_batches(everything, processes):
    full = take(everything(), 6)
    shares = [
        take(everything(), 6, process_index=p, process_count=processes) for p in range(processes)
    ]
    for step, batch in enumerate(full):
        parts = [fraction[step] for fraction in shares]
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), batch)


def test_an_epoch_visits_every_window_once(mixture):
    size = mixture.num_windows
    batches = take(mixture, size)  # of eight: eight epochs
    ends = [b.observation.images["primary"][:, -1, 0, 0, :2] for b in batches]
    epochs = np.concatenate(ends).reshape(8, size, 2).tolist()
    entries = sorted([e, t] for e, length in enumerate(LENGTHS) for t in range(length))
    assert all(sorted(epoch) == entries for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_two_runs_are_identical(everything):
    for a, b in zip(take(everything(), 20), take(everything(), 20, threads=3), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(mixture, processes):
    full = take(mixture, 3)
    shares = [take(mixture, 3, process_index=p, process_count=processes) for p in range(processes)]
    for step, batch in enumerate(full):
        parts = [fraction[step] for fraction in shares]
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), batch)


def test_nor_on_threads_and_prefetching(mixture):
    for a, b in zip(take(mixture, 4), take(mixture, 4, threads=5, prefetch=1), strict=True):
        assert_equal(a, b)


def test_resume_equals_going_on(mixture):
    with Loader(mixture, encode, 8, 3, prefetch=4) as loader:
        for _ in range(3):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [next(loader) for _ in range(4)]
    assert state["samples"] == 24  # what was returned, not what was prefetched
    for start in (state, state["samples"]):
        for a, b in zip(take(mixture, 4, start=start), expected, strict=True):
            assert_equal(a, b)
    (other_size,) = [b.sample for b in take(mixture, 1, start=24)]
    assert other_size[0].tolist() == [0, 24]


def test_state_of_other_data_is_refused(mixture, tmp_path, data_config, structure):
    with Loader(mixture, encode, 8, 3) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match="seed: was 3, is 4"):
        Loader(mixture, encode, 8, 4, start=state)
    other = write_calvin(tmp_path / "other" / "1.0.0", [7, 3, 12, 5])
    config = data_config(("calvin", other, 1.0), val_fraction=0.0)
    changed = open_datasets(config, structure(), 7, "train")
    with pytest.raises(ValueError, match=r"sizes: was \[26\], is \[27\]\n.*digest: was"):
        Loader(changed, encode, 8, 3, start=state)


def test_sample_numbers_beyond_32_bits(mixture):
    (batch,) = take(mixture, 1, start=2**32 - 2)
    assert batch.sample[:3].tolist() == [[0, 2**32 - 2], [0, 2**32 - 1], [1, 0]]


def test_without_shuffle_every_window_comes_once_in_order(mixture):
    with Loader(mixture, encode, 8, 0, shuffle=False) as loader:
        assert len(loader) == 3
        batches = list(loader)
    assert len(batches) == 3
    assert batches[-1].sample[-1].tolist() == [0, 23]
    with Loader(mixture, encode, 8, 0, shuffle=False, pad_last=True) as loader:
        assert len(loader) == 4
        padded = list(loader)
    frames = np.concatenate([b.observation.images["primary"][:, -1, 0, 0, :2] for b in padded])
    expected = [[e, t] for e, length in enumerate(LENGTHS) for t in range(length)]
    assert frames[:26].tolist() == expected
    assert frames[26:].tolist() == [expected[-1]] * 6
    assert not padded[-1].actions.mask[2:].any()
    assert padded[-1].actions.mask[1].any()
    for a, b in zip(batches, padded, strict=False):
        assert_equal(a, b)


def test_shuffled_loader_has_no_length(mixture):
    with Loader(mixture, encode, 8, 0) as loader, pytest.raises(TypeError, match="no length"):
        len(loader)


def test_batches_that_are_held_are_not_overwritten(mixture):
    with Loader(mixture, encode, 8, 0, prefetch=1) as loader:
        batch = next(loader)
        row = batch.observation.images["primary"][3, 1:]
        device = jax.device_put(batch.observation.images)
        expected, on_device = row.copy(), jax.tree.map(np.array, device)
        del batch
        places = {next(loader).observation.images["primary"].ctypes.data for _ in range(20)}
        np.testing.assert_array_equal(row, expected)
        assert_equal(device, on_device)
        assert len(places) <= 5  # and the others are reused


def test_each_instruction_is_tokenised_once(mixture):
    calls = []

    def counted(text):
        calls.append(text)
        return encode(text)

    with Loader(mixture, counted, 8, 0) as loader:
        for _ in range(5):
            next(loader)
    assert calls == mixture.instructions == ["task 0", "task 1", "task 2"]


def test_too_long_prompts_are_all_listed(mixture):
    tokenizer = Tokenizer.build(mixture.instructions, 16)
    with pytest.raises(
        errors.TextLengthError, match=r"3 prompts are too long:(.|\n)*'task 2' has 4"
    ):
        Loader(mixture, lambda text: tokenizer.encode(text, 3), 8, 0)


def test_corrupt_image_names_everything(calvin, data_config, structure):
    shard = next(calvin.glob("*-train.tfrecord-*"))
    results = [record for _, record in records.read_records(shard)]
    field = records.walk_example(results[2])["steps/observation/rgb_gripper"]
    start, stop = records.byte_spans(results[2], field)[6]
    results[2] = results[2][: start + 4] + bytes(stop - start - 4) + results[2][stop:]
    shard.write_bytes(b"".join(map(records.frame_record, results)))
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.0)
    mixture = open_datasets(config, structure(cameras=("wrist",)), 7, "train")
    before = threading.active_count()
    message = rf"{shard.name}, episode 2, frame 6: dataset 'calvin', camera 'wrist' .*corrupt JPEG"
    loader = Loader(mixture, encode, 8, 0, shuffle=False)
    with pytest.raises(errors.ImageDecodeError, match=message):
        list(loader)
    assert threading.active_count() <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_close_ends_the_threads(mixture):
    before = threading.active_count()
    loader = Loader(mixture, encode, 8, 0, prefetch=2)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_one_left_open_is_closed_when_the_interpreter_ends(mixture, monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    before = set(threading.enumerate())
    next(Loader(mixture, encode, 8, 3))
    started = set(threading.enumerate()) - before
    assert started
    for function in at_exit:
        function()
    assert not any(thread.is_alive() for thread in started)


def test_batch_that_does_not_divide(mixture):
    with pytest.raises(ValueError, match="batch_size 8 cannot be split: process 0 of 3"):
        Loader(mixture, encode, 8, 0, process_count=3)
