"""Samples per CPU-second of our loader beside a plain tf.data pipeline, in one run.

    python bench/loader.py --data DIR --window 1 8 --json loader.json

DIR holds bridge_dataset/1.0.0. Every pipeline runs in a process of its own, so that memory is its
own too, and they take turns. Samples per CPU-second (user + system time of the whole process) is
the figure of merit: wall time depends on what else the machine does.

The reference does on the host what the published RLDS pipelines do there: TFDS builder, steps left
encoded, standardize, normalize, window and chunk, flatten, shuffle buffer, decode, Lanczos resize
to 224 with antialiasing, crop, brightness, contrast, saturation, hue, batch. octo and openvla, as
they come, also draw a goal image from the rest of the trajectory and treat it like the others: the
second reference does that too. The third is octo itself, where `octo` and `dlimp` can be imported
(their checkouts on PYTHONPATH will do), with the same settings. Ours stops at decoded uint8
windows: resizing, augmentation and scaling are moved to the device: from the index, or from the
stream that serves object stores, whose pool of episodes holds about as many windows as the
reference's buffer. The last row adds Pillow's resize on the host, for machines that want it there.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing

PIPELINES = {
    "tf.data": "all on the host: decode, resize to 224, augment",
    "tf.data + goal": "as tf.data, and a goal image a sample, the default of octo and openvla",
    "octo": "octo's own loader, goal image included",
    "ours": "index; decode on the host; resize, augmentation and scaling moved to the device",
    "ours, stream": "as ours, read from front to back through tf.data (data.reader=stream)",
    "ours + Pillow": "as ours, and Pillow's bicubic resize to 224 on the host",
}
REFERENCES = ("tf.data", "tf.data + goal", "octo")
CHUNK, SIZE, DATASET = 10, 224, "bridge_dataset"
EPISODE = 31  # steps, about the mean of Bridge


def main() -> None:
    """Runs every pipeline at every window and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="holds bridge_dataset/1.0.0")
    parser.add_argument("--window", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument(
        "--shuffle",
        type=int,
        default=2000,
        help="samples in the references' buffers, and about as many in the stream's pool of"
        " episodes (default: 2000); the index draws from the whole dataset, whatever this is",
    )
    parser.add_argument("--cpu-seconds", type=float, default=8.0, help="measured, a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", default="", help="where the index lives; default: temporary")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--worker", choices=PIPELINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_measure(args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.cache = args.cache or scratch
        _bounds_file(args).write_text(json.dumps(_mixture(args, 1).statistics[DATASET]["action"]))
        rows = [row for window in args.window for row in _compare(args, window)]
    _report(args, rows)
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"pipelines": PIPELINES, "rows": rows}, indent=1))
        os.replace(temporary, args.json)


def _compare(args: argparse.Namespace, window: int) -> list[dict[str, Any]]:
    """Median over the repeats of each pipeline at one window."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in _runnable()}
    for _ in range(args.repeats):
        for name in runs:
            command = [sys.executable, __file__, "--worker", name, "--window", str(window)]
            for key in ("data", "batch", "threads", "prefetch", "shuffle", "cpu_seconds", "cache"):
                command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, results in runs.items():
        row = {key: statistics.median(r[key] for r in results) for key in results[0]}
        rows.append({"window": window, "pipeline": name, **row})
    speeds = {row["pipeline"]: row["samples_per_cpu_s"] for row in rows}
    for row in rows:
        row["against"] = {
            name: row["samples_per_cpu_s"] / speeds[name] for name in REFERENCES if name in speeds
        }
    return rows


def _runnable() -> list[str]:
    octo = all(map(importlib.util.find_spec, ("octo", "dlimp")))
    return [name for name in PIPELINES if name != "octo" or octo]


def _report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    settings = f"batch {args.batch}, chunk {CHUNK}, shuffle {args.shuffle}, {args.threads} threads"
    print(f"{settings}; median of {args.repeats}")
    for name in _runnable():
        print(f"  {name:14} {PIPELINES[name]}")
    head = ["window", "pipeline", "samples/CPU-s", *(f"against {n}" for n in rows[0]["against"])]
    head += ["samples/s", "peak RSS MB", "above import MB"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for r in rows:
        numbers = [r["samples_per_cpu_s"], *r["against"].values(), r["samples_per_s"]]
        numbers = " | ".join(f"{number:.1f}" for number in numbers)
        memory = f"{r['peak_rss_mb']:.0f} | {r['rss_above_import_mb']:.0f}"
        print(f"| {r['window']} | {r['pipeline']} | {numbers} | {memory} |")


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """Runs one pipeline in this process."""
    (window,) = args.window
    ours = args.worker not in REFERENCES
    if ours:
        import vla_jax.data.loader  # noqa: F401 - memory is counted from here
    if args.worker in (*REFERENCES, "ours, stream"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import tensorflow as tf  # noqa: F401
        import tensorflow_datasets  # noqa: F401
    imported = _resident_mb()
    make = _ours if ours else _octo if args.worker == "octo" else _reference
    batches = make(args, window)
    for _ in range(max(4, 64 // args.batch)):  # fills the shuffle buffer, starts the threads
        next(batches)
    cpu, wall, samples = _cpu_seconds(), time.perf_counter(), 0
    while _cpu_seconds() - cpu < args.cpu_seconds:
        images = next(batches)
        if images.shape[:2] != (args.batch, window) or images.dtype != np.uint8:
            raise RuntimeError(f"unexpected batch: {images.dtype} {images.shape}")
        samples += len(images)
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "samples_per_cpu_s": samples / cpu,
        "samples_per_s": samples / wall,
        "peak_rss_mb": peak,
        "rss_above_import_mb": peak - imported,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _mixture(args: argparse.Namespace, window: int):
    from configs.base import get_config
    from vla_jax.config import resolve
    from vla_jax.data.loader import open_datasets

    c = get_config()
    folder = str(args.data / DATASET / "1.0.0")
    c.data.update({"datasets": ({"spec": DATASET, "dir": folder, "weight": 1.0},)})
    c.data.cache_dir = args.cache
    if args.worker == "ours, stream":
        c.data.update({"reader": "stream", "pool": max(1, args.shuffle // EPISODE)})
    c.model.structure.update({"window": window, "chunk": CHUNK, "cameras": ("primary",)})
    config = resolve(c)
    return open_datasets(config.data, config.model.structure, 7, "train")


def _ours(args: argparse.Namespace, window: int) -> Iterator[np.ndarray]:
    from PIL import Image

    from vla_jax.data.language.tokenizer import Tokenizer
    from vla_jax.data.loader import Loader

    mixture = _mixture(args, window)
    tokenizer = Tokenizer.build(mixture.instructions, 256)
    loader = Loader(
        mixture,
        lambda text: tokenizer.encode(text, 32),
        args.batch,
        seed=0,
        threads=args.threads,
        prefetch=args.prefetch,
    )
    resized = np.empty((args.batch, window, SIZE, SIZE, 3), np.uint8)
    for batch in loader:
        images = batch.observation.images["primary"]
        if args.worker != "ours + Pillow":
            yield images
            continue
        for source, out in zip(images, resized, strict=True):
            for j, frame in enumerate(source):
                small = Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                out[j] = np.asarray(small)
        yield resized


def _reference(args: argparse.Namespace, window: int) -> Iterator[np.ndarray]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    goals, bounds = args.worker == REFERENCES[1], json.loads(_bounds_file(args).read_text())
    low, high = (np.array(bounds[key][:6], np.float32) for key in ("q01", "q99"))
    builder: Any = tfds.builder_from_directory(str(args.data / DATASET / "1.0.0"))
    episodes = builder.as_dataset(
        split="train",
        shuffle_files=True,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(skip_prefetch=True, interleave_cycle_length=2),
    ).repeat()

    def standardize(episode):
        steps = episode["steps"]
        state, gripper = steps["observation"]["state"], steps["action"][:, 6]
        definite = tf.logical_or(gripper > 0.95, gripper < 0.05)

        def settle(carry, element):
            sure, value = element
            return tf.cond(sure, lambda: tf.cast(value > 0.95, tf.float32), lambda: carry)

        gripper = tf.scan(settle, (definite, gripper), gripper[-1], reverse=True)
        arm = 2 * (state[1:, :6] - state[:-1, :6] - low) / (high - low + 1e-8) - 1
        action = tf.concat([tf.clip_by_value(arm, -1, 1), gripper[:-1, None]], axis=1)
        images, text = steps["observation"]["image_0"], steps["language_instruction"]
        return {"image": images[:-1], "action": action, "text": text[:-1]}

    def windows(trajectory):
        length = tf.shape(trajectory["action"])[0]
        frames = tf.range(length)[:, None] + tf.range(1 - window, 1)
        targets = tf.maximum(frames, 0)[:, :, None] + tf.range(CHUNK)
        ahead = tf.random.uniform(tf.shape(trajectory["text"])) * tf.cast(
            length - tf.range(length), tf.float32
        )
        goal = tf.minimum(tf.range(length) + tf.cast(ahead, tf.int32), length - 1)
        return {
            **({"goal": tf.gather(trajectory["image"], goal)} if goals else {}),
            "image": tf.gather(trajectory["image"], tf.maximum(frames, 0)),
            "image_mask": frames >= 0,
            "action": tf.gather(trajectory["action"], tf.minimum(targets, length - 1)),
            "action_mask": targets < length,
            "text": trajectory["text"],
        }

    def pixels(sample):
        seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
        frames = tf.unstack(tf.ensure_shape(sample["image"], [window]))
        sample["image"] = tf.stack([_augment(_resize(frame), seed) for frame in frames])
        if goals:
            sample["goal"] = _augment(_resize(sample["goal"]), seed)
        return sample

    dataset = episodes.map(standardize, num_parallel_calls=args.threads)
    dataset = dataset.filter(lambda t: tf.reduce_any(t["text"] != ""))
    dataset = dataset.map(windows, num_parallel_calls=args.threads)
    dataset = dataset.flat_map(tf.data.Dataset.from_tensor_slices).shuffle(args.shuffle)
    dataset = dataset.map(pixels, num_parallel_calls=args.threads, deterministic=False)
    dataset = dataset.batch(args.batch, drop_remainder=True).prefetch(args.prefetch)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = args.threads
    options.deterministic = False
    for batch in dataset.with_options(options).as_numpy_iterator():
        yield batch["image"]


def _octo(args: argparse.Namespace, window: int) -> Iterator[np.ndarray]:
    from octo.data.dataset import make_interleaved_dataset  # type: ignore[import-not-found]
    from octo.data.oxe import make_oxe_dataset_kwargs  # type: ignore[import-not-found]

    # It writes statistics beside the data: into links to them here, and reads those it finds.
    links = Path(args.cache) / "octo" / DATASET / "1.0.0"
    links.mkdir(parents=True, exist_ok=True)
    for file in (args.data.resolve() / DATASET / "1.0.0").iterdir():
        if not (links / file.name).exists():
            (links / file.name).symlink_to(file)
    augment = {
        "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
        "random_brightness": [0.2],
        "random_contrast": [0.8, 1.2],
        "random_saturation": [0.8, 1.2],
        "random_hue": [0.05],
    }
    batches = make_interleaved_dataset(
        [make_oxe_dataset_kwargs(DATASET, str(links.parents[1]))],
        train=True,
        shuffle_buffer_size=args.shuffle,
        batch_size=args.batch,
        traj_transform_kwargs={
            "window_size": window,
            "action_horizon": CHUNK,
            "goal_relabeling_strategy": "uniform",
        },
        frame_transform_kwargs={
            "resize_size": {"primary": (SIZE, SIZE)},
            "image_augment_kwargs": {"primary": {**augment, "augment_order": list(augment)}},
            "num_parallel_calls": args.threads,
        },
        traj_transform_threads=args.threads,
        traj_read_threads=args.threads,
    )
    for batch in batches.prefetch(args.prefetch).as_numpy_iterator():
        yield batch["observation"]["image_primary"]


def _resize(encoded):
    import tensorflow as tf

    frame = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    frame = tf.image.resize(frame, (SIZE, SIZE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(frame), 0, 255), tf.uint8)


def _augment(frame, seed):
    """Crop of 0.9 of the area, brightness 0.2, contrast and saturation 0.8-1.2, hue 0.05."""
    import tensorflow as tf

    side = 0.9**0.5
    offset = tf.random.stateless_uniform([2], seed) * (1 - side)
    box = tf.concat([offset, offset + side], axis=0)[None]
    frame = tf.image.convert_image_dtype(frame, tf.float32)
    frame = tf.image.crop_and_resize(frame[None], box, [0], (SIZE, SIZE))[0]
    for change in (
        lambda x: tf.image.stateless_random_brightness(x, 0.2, seed),
        lambda x: tf.image.stateless_random_contrast(x, 0.8, 1.2, seed),
        lambda x: tf.image.stateless_random_saturation(x, 0.8, 1.2, seed),
        lambda x: tf.image.stateless_random_hue(x, 0.05, seed),
    ):
        frame = tf.clip_by_value(change(frame), 0, 1)
    return tf.image.convert_image_dtype(frame, tf.uint8, saturate=True)


def _bounds_file(args: argparse.Namespace) -> Path:
    """Action statistics for the reference, made beforehand so that they cost it nothing."""
    return Path(args.cache) / f"reference-{DATASET}.json"


if __name__ == "__main__":
    main()
