"""LeRobot's side of `bench/lerobot_video.py`; runs in LeRobot's own environment, without vla_jax.

python bench/lerobot_side.py write PICTURES.npy DIR --codec libsvtav1 --gop 2
python bench/lerobot_side.py load DIR --window 1
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from lerobot.configs.video import RGBEncoderConfig  # type: ignore[import-not-found]
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]

FPS, SIZE, CHUNK, BATCH = 10, 224, 10, 32
CAMERAS = ("observation.images.front", "observation.images.wrist")


def main() -> None:
    """Writes a dataset, or loads one and prints its speed as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("pictures", type=Path)
    write.add_argument("directory", type=Path)
    write.add_argument("--codec", default="libsvtav1")
    write.add_argument("--gop", type=int, default=2)
    write.add_argument("--episodes", type=int, default=24)
    write.add_argument("--frames", type=int, default=120)
    write.add_argument("--file-mb", type=int, help="of a video file; default: LeRobot's own 200")
    load = commands.add_parser("load")
    load.add_argument("directory", type=Path)
    load.add_argument("--window", type=int, default=1)
    load.add_argument("--workers", type=int, default=2)
    load.add_argument("--cpu-seconds", type=float, default=4.0)
    load.add_argument("--frames", type=Path, help="decode these (.npy) into FRAMES.out.npy")
    args = parser.parse_args()
    if args.command == "write":
        _write(args)
    elif args.frames:
        _frames(args)
    else:
        print(json.dumps(_load(args)))


def _write(args: argparse.Namespace) -> None:
    """Moving crops of the pictures, a moving patch and a little noise, in LeRobot's own files."""
    pictures, rng = np.load(args.pictures), np.random.default_rng(0)
    features: dict[str, dict[str, Any]] = {
        camera: {
            "dtype": "video",
            "shape": (SIZE, SIZE, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in CAMERAS
    }
    features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
    features["observation.state"] = {"dtype": "float32", "shape": (7,), "names": None}
    dataset = LeRobotDataset.create(
        "bench/video", FPS, features, root=args.directory, streaming_encoding=True,
        rgb_encoder=RGBEncoderConfig(vcodec=args.codec, g=args.gop),
        video_files_size_in_mb=args.file_mb,
    )  # fmt: skip
    for episode in range(args.episodes):
        for frame in range(args.frames):
            row = {
                "action": rng.normal(size=7).astype(np.float32),
                "observation.state": rng.normal(size=7).astype(np.float32),
                "task": "open the door" if episode % 2 else "pick up the cup",
            }
            for number, camera in enumerate(CAMERAS):
                picture = pictures[(2 * episode + number) % len(pictures)]
                row[camera] = _frame(picture, frame / args.frames, rng)
            dataset.add_frame(row)
        dataset.save_episode()
    dataset.finalize()


def _frame(picture: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    room = min(picture.shape[:2]) - SIZE
    at = round(room * share)
    frame = picture[at : at + SIZE, room - at : room - at + SIZE].astype(np.int16)
    x, y = int(180 * share), int(90 + 80 * np.sin(9 * share))
    frame[y : y + 30, x : x + 30] = (200, 40, 60)
    return np.clip(frame + rng.integers(-4, 5, frame.shape, np.int16), 0, 255).astype(np.uint8)


def _dataset(args: argparse.Namespace) -> LeRobotDataset:
    deltas = {camera: [-i / FPS for i in range(args.window)][::-1] for camera in CAMERAS}
    deltas |= {"action": [i / FPS for i in range(CHUNK)]}
    # As lerobot.datasets.factory sets it for training.
    return LeRobotDataset(
        "bench/video", root=args.directory, delta_timestamps=deltas, return_uint8=True
    )


def _frames(args: argparse.Namespace) -> None:
    args.window = 1
    dataset = _dataset(args)
    rows = [dataset[int(i)] for i in np.load(args.frames)]
    frames = [
        [row[c].reshape(3, SIZE, SIZE).permute(1, 2, 0).numpy() for c in CAMERAS] for row in rows
    ]
    np.save(args.frames.with_suffix(".out.npy"), np.array(frames))


def _load(args: argparse.Namespace) -> dict[str, float]:
    """Samples of random batches per CPU-second, of this process and its workers."""
    dataset = _dataset(args)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**7)
    batches = iter(
        torch.utils.data.DataLoader(
            dataset, BATCH, sampler=sampler, num_workers=args.workers, drop_last=True
        )
    )
    for _ in range(4):
        next(batches)
    cpu, wall, samples = _cpu_seconds(), time.perf_counter(), 0
    while _cpu_seconds() - cpu < args.cpu_seconds:
        batch = next(batches)
        if batch[CAMERAS[0]].dtype != torch.uint8:
            raise RuntimeError(f"unexpected pixels: {batch[CAMERAS[0]].dtype}")
        samples += BATCH
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory += sum(_peak_mb(child) for child in _children())
    return {"samples_per_cpu_s": samples / cpu, "samples_per_s": samples / wall, "rss_mb": memory}


def _children() -> list[int]:
    return [int(c) for c in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _peak_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _cpu_seconds() -> float:
    """Of this process and its living workers, which the kernel adds only once they have ended."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = sum(os.times()[:2])
    for child in _children():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / ticks
    return seconds


if __name__ == "__main__":
    main()
