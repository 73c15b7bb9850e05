"""Small datasets in the published layouts of CALVIN and LeRobot, made from numbers."""

import io
import json
from typing import Any

import numpy as np
from PIL import Image

START = 358482  # first frame id of CALVIN's debug dataset
TASKS = ["open_drawer", "push_red_block_left", "turn_on_led"]
TEXTS = ["pull the handle", "push the red block to the left", "turn on the led light"]


def calvin_frame(frame, size=16) -> dict[str, Any]:
    """What `episode_<frame>.npz` holds; pixels and numbers follow from the frame's id."""
    rng = np.random.default_rng(frame)
    rel = np.concatenate([rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0], 1)])
    static = rng.integers(0, 255, (size, size, 3)).astype(np.uint8)
    static[0, 0] = (*divmod(frame % 65536, 256), 7)
    return {
        "actions": rng.normal(size=7),
        "rel_actions": rel,
        "robot_obs": rng.normal(size=15),
        "scene_obs": rng.normal(size=24),
        "rgb_static": static,
        "rgb_gripper": rng.integers(0, 255, (8, 12, 3)).astype(np.uint8),
        "depth_static": rng.normal(size=(size, size)).astype(np.float32),
    }


def write_calvin_npz(
    root,
    recordings=((START, START + 39), (START + 60, START + 79)),
    spans=((3, 20), (12, 30), (60, 75)),
    splits=("training", "validation"),
    frame=calvin_frame,
):
    """A CALVIN download; `spans` are relative to the first frame, their ends exclusive."""
    for split in splits:
        folder = root / split
        (folder / "lang_annotations").mkdir(parents=True)
        for first, last in recordings:
            for number in range(first, last + 1):
                np.savez_compressed(folder / f"episode_{number:07d}.npz", **frame(number))
        np.save(folder / "ep_start_end_ids.npy", np.array(recordings))
        scenes: Any = {"calvin_scene_B": [0, START + 50], "calvin_scene_C": [START + 51, 10**6]}
        np.save(folder / "scene_info.npy", scenes, allow_pickle=True)
        count = len(spans)
        annotations: Any = {
            "language": {
                "ann": (TEXTS * count)[:count],
                "task": (TASKS * count)[:count],
                "emb": np.zeros((count, 1, 384), np.float32),
            },
            "info": {"episodes": [], "indx": [(START + a, START + b) for a, b in spans]},
        }
        path = folder / "lang_annotations" / "auto_lang_ann.npy"
        np.save(path, annotations, allow_pickle=True)
    return root


LENGTHS = (13, 9, 21)
TOLD = ("pick up the cup", "open the door", "pick up the cup")
KEY = "observation.images.front"


def lerobot_rows(lengths=LENGTHS, fps=10):
    """The columns of every episode; actions name their episode and step."""
    collected, index = [], 0
    tasks = list(dict.fromkeys(TOLD))
    for number, length in enumerate(lengths):
        rng = np.random.default_rng(number)
        action = rng.normal(size=(length, 7)).astype(np.float32)
        action[:, 0], action[:, 1] = number, np.arange(length)
        collected.append(
            {
                "action": action,
                "observation.state": rng.normal(size=(length, 2, 3)).astype(np.float32),
                "observation.state.wide": rng.normal(size=length),
                "next.done": np.arange(length) == length - 1,
                "note": [f"note {number}"] * length,
                "timestamp": (np.arange(length) / fps).astype(np.float32),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, number),
                "index": index + np.arange(length),
                "task_index": np.full(length, tasks.index(TOLD[number])),
            }
        )
        index += length
    return collected


def lerobot_pixels(number, length, size=(48, 64)):
    """Smooth pictures that tell episode and step by their colours, even after lossy coding."""
    frames = np.zeros((length, *size, 3), np.uint8)
    frames[..., 0] = 20 + 70 * number
    frames[..., 1] = 10 * np.arange(length)[:, None, None]
    frames[..., 2] = np.linspace(0, 200, size[1]).astype(np.uint8)
    return frames


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_video(path, pictures, fps=10, codec="libx264", gop=2):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def _table(rows, images):
    import pyarrow as arrow

    columns = {}
    for key, values in rows.items():
        if isinstance(values, list) or values.ndim == 1:
            columns[key] = arrow.array(values)
        elif values.ndim == 2:
            flat = arrow.array(values.reshape(-1))
            columns[key] = arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            columns[key] = arrow.array(values.tolist(), arrow.list_(arrow.list_(arrow.float32())))
    if images is not None:
        columns[KEY] = arrow.array([{"bytes": data, "path": None} for data in images])
    return arrow.table(columns)


def write_lerobot(root, version="v2.1", images="video", fps=10, codec="libx264", gop=2):
    """A LeRobot dataset; v3.0 puts all videos into one file and two episodes into a data file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows, modern = lerobot_rows(fps=fps), version == "v3.0"
    pictures = [lerobot_pixels(number, length) for number, length in enumerate(LENGTHS)]
    pngs = [[encoded(p) for p in episode] if images == "image" else None for episode in pictures]
    tables = [_table(episode, data) for episode, data in zip(rows, pngs, strict=True)]
    tasks = list(dict.fromkeys(TOLD))
    meta, data = root / "meta", root / "data" / "chunk-000"
    meta.mkdir(parents=True)
    data.mkdir(parents=True)
    shapes = {key: list(np.shape(values)[1:]) or [1] for key, values in rows[0].items()}
    dtypes = {
        key: "string" if isinstance(values, list) else values.dtype.name
        for key, values in rows[0].items()
    }
    described = {
        key: {"dtype": dtypes[key], "shape": shapes[key], "names": None} for key in rows[0]
    }
    described[KEY] = {
        "dtype": images,
        "shape": [3, 48, 64],
        "names": ["channels", "height", "width"],
    }
    info = {
        "codebase_version": version,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "features": described,
    }
    episodes = []
    for number, length in enumerate(LENGTHS):
        episodes.append({"episode_index": number, "tasks": [TOLD[number]], "length": length})
        if not modern:
            parquet.write_table(tables[number], data / f"episode_{number:06d}.parquet")
            if images == "video":
                video = root / "videos" / "chunk-000" / KEY / f"episode_{number:06d}.mp4"
                write_video(video, pictures[number], fps, codec, gop)
    if modern:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        for file, members in enumerate(([0, 1], [2])):
            with parquet.ParquetWriter(data / f"file-{file:03d}.parquet", tables[0].schema) as out:
                for number in members:
                    out.write_table(tables[number])
                    episodes[number] |= {"data/chunk_index": 0, "data/file_index": file}
        if images == "video":
            video = root / "videos" / KEY / "chunk-000" / "file-000.mp4"
            write_video(video, np.concatenate(pictures), fps, codec, gop)
            for number in range(len(LENGTHS)):
                place: dict[str, float] = {"chunk_index": 0, "file_index": 0}
                place["from_timestamp"] = sum(LENGTHS[:number]) / fps
                episodes[number] |= {f"videos/{KEY}/{k}": v for k, v in place.items()}
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        table = arrow.Table.from_pylist(episodes)
        parquet.write_table(table, meta / "episodes" / "chunk-000" / "file-000.parquet")
        columns = {"task_index": list(range(len(tasks))), "__index_level_0__": tasks}
        parquet.write_table(arrow.table(columns), meta / "tasks.parquet")
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        lines = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
        (meta / "tasks.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (meta / "episodes.jsonl").write_text("".join(json.dumps(x) + "\n" for x in episodes))
    (meta / "info.json").write_text(json.dumps(info, indent=1))
    return root
