"""A policy server under many sessions: latency, throughput, and every reply checked.

    python bench/serve.py --sessions 64 --steps 40 --json runs/bench/serve.json

Serves configs/quickstart.py's architecture with random weights. A second process holds the
sessions, each of which sends its own observations one after another and compares every reply with
what the policy says to the same episode alone, one observation at a time. Batching on and off take
turns in the same run. A reply that is missing, another session's or another step's fails the run.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOLERANCE = 1e-6
SIZE = 32  # pixels: what the tiny vision tower takes


def observe(session: int, step: int) -> dict[str, Any]:
    """What a session sees at a step; differs for each of them."""
    rng = np.random.default_rng((session, step))
    keys = ("observation/image", "observation/wrist_image")
    images = {key: rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for key in keys}
    return {**images, "prompt": f"lift the {('red', 'blue', 'pink')[session % 3]} block"}


def make_policy(max_batch: int) -> Any:
    """The quickstart's architecture with random weights; the same weights every time."""
    import jax

    from configs import quickstart
    from vla_jax.config import resolve
    from vla_jax.data.language.tokenizer import Tokenizer
    from vla_jax.data.units.normalize import ActionSpec
    from vla_jax.inference.policy import Policy
    from vla_jax.models import vla

    config = resolve(quickstart.get_config())
    model = vla.build(config.model)
    params = jax.jit(lambda key: vla.initial_params(model, key))(jax.random.key(0))
    prompt = vla.prompt(config.model)
    texts = [prompt.format(instruction=observe(i, 0)["prompt"]) for i in range(3)]
    tokenizer = Tokenizer.build(texts, model.word_ids)
    ones = (1.0,) * 6
    spec = ActionSpec(7, "none", 1.0, tuple(-x for x in ones), ones, (-1.0, 1.0), hz=10.0)
    return Policy(config, params, tokenizer, spec, "random", max_batch=max_batch)


def alone(policy: Any, sessions: int, steps: int) -> np.ndarray:
    """Every reply of every episode, one observation at a time: [sessions, steps, f, a]."""
    replies = []
    for i in range(sessions):
        session, episode = policy.new_session(), []
        for step in range(steps):
            reply, session = policy.infer(session, observe(i, step))
            episode.append(reply["actions"])
        replies.append(episode)
    return np.array(replies)


def clients(pipe: Connection, uri: str, expected: np.ndarray, think: float) -> None:
    """All sessions, in a process of their own; sends (milliseconds [sessions, steps], errors)."""
    pipe.send(asyncio.run(_clients(uri, expected, think)))


async def _clients(uri: str, expected: np.ndarray, think: float) -> tuple[Any, Any]:
    from websockets.asyncio.client import connect

    from vla_jax.serve import msgpack_numpy

    sessions, steps = expected.shape[:2]
    milliseconds, errors = np.full((2, sessions, steps), np.inf)
    ready = asyncio.Barrier(sessions)

    async def session(i: int) -> None:
        async with connect(uri, compression=None, max_size=None, proxy=None) as ws:
            await ws.recv()
            messages = [msgpack_numpy.pack(observe(i, step)) for step in range(steps)]
            await ready.wait()
            for step, message in enumerate(messages):
                begin = time.perf_counter()
                await ws.send(message)
                answer = await ws.recv()
                milliseconds[i, step] = (time.perf_counter() - begin) * 1e3
                if isinstance(answer, str):
                    raise RuntimeError(f"session {i}, step {step}: {answer}")
                actions = msgpack_numpy.unpack(answer)["actions"]
                errors[i, step] = np.abs(actions - expected[i, step]).max()
                await asyncio.sleep(think)

    await asyncio.gather(*(session(i) for i in range(sessions)))
    return milliseconds, errors


def measure(policy: Any, expected: np.ndarray, think: float, max_wait: float) -> dict[str, Any]:
    """One server, one process of clients."""
    from vla_jax.serve import server

    sessions, steps = expected.shape[:2]
    options = server.ServerOptions(port=0, max_sessions=sessions, max_wait=max_wait)
    spawn = multiprocessing.get_context("spawn")
    with server.background(policy, options) as uri:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=clients, args=(theirs, uri, expected, think))
        process.start()
        theirs.close()
        try:
            milliseconds, errors = ours.recv()
        except EOFError:
            sys.exit("the clients failed; see their error above")
        process.join()
        with urllib.request.urlopen(f"http{uri.removeprefix('ws')}/metrics") as page:
            samples = dict(
                line.rsplit(" ", 1)
                for line in page.read().decode().splitlines()
                if not line.startswith("#")
            )
    # In lockstep the slowest session's episode is the length of the run.
    seconds = (milliseconds.sum(axis=1) / 1e3 + think * steps).max()
    passes = float(samples["vla_batch_size_count"])
    return {
        "replies": int(np.isfinite(errors).sum()),
        "wrong": int((~(errors <= TOLERANCE)).sum()),
        "max_error": float(errors.max()),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "replies_per_s": sessions * steps / seconds,
        "mean_batch": float(samples["vla_batch_size_sum"]) / passes,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sessions", type=int, default=64, help="default: %(default)s")
    add("--steps", type=int, default=40, help="requests of each session (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of each kind, taking turns (default: %(default)s)")
    add("--max-batch", type=int, default=64, help="with batching (default: %(default)s)")
    add("--max-wait-ms", type=float, default=5.0, help="with batching (default: %(default)s)")
    add("--think-ms", type=float, default=0.0, help="between reply and request (default: 0)")
    add("--json", metavar="FILE", help="write all rounds there")
    flags = parser.parse_args()
    off, on = make_policy(1), make_policy(flags.max_batch)
    expected = alone(off, flags.sessions, flags.steps)
    apart = np.abs(expected[:, None] - expected[None, :]).max(axis=(-1, -2))
    apart[np.arange(flags.sessions), np.arange(flags.sessions)] = np.inf
    if apart.min() <= 100 * TOLERANCE:
        sys.exit("two sessions expect the same reply: a crossed one would not be seen")
    rounds: list[dict[str, Any]] = []
    for number in range(flags.rounds):
        for name, policy in (("off", off), ("on", on)):
            wait = flags.max_wait_ms / 1e3 if name == "on" else 0.0
            found = measure(policy, expected, flags.think_ms / 1e3, wait)
            rounds.append({"batching": name, "round": number, **found})
            print(json.dumps(rounds[-1]), flush=True)
    print(table(rounds))
    if flags.json:
        path = Path(flags.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(json.dumps({"flags": vars(flags), "rounds": rounds}, indent=1))
        os.replace(beside, path)
    wanted = flags.sessions * flags.steps
    if any(r["wrong"] or r["replies"] != wanted for r in rounds):
        sys.exit("replies were lost, or were not those of their session")


def table(rounds: list[dict[str, Any]]) -> str:
    """The median round of each kind, as Markdown."""
    keys = ("p50_ms", "p99_ms", "replies_per_s", "mean_batch")
    lines = ["| batching | p50, ms | p99, ms | replies/s | mean batch | wrong |", "|---" * 6 + "|"]
    for name in ("off", "on"):
        own = [r for r in rounds if r["batching"] == name]
        cells = [f"{np.median([r[key] for r in own]):.1f}" for key in keys]
        wrong = sum(r["wrong"] for r in own)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {wrong} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
