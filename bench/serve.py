"""A policy server under many sessions: latency, throughput, and every reply checked.

    python bench/serve.py --sessions 64 --steps 40 --openpi CHECKOUT --json runs/bench/serve.json

Serves configs/quickstart.py's architecture, or with --model=midsize a Kosmos-2 policy head of 107.9
M numbers, with random weights. A second process holds the sessions, each of which sends its own
observations one after another and compares every reply with what the policy says to the same
episode alone, one observation at a time. Batching on and off take turns in the same run, and where
a checkout of openpi is named its own server around the same policy: that has one state for all who
connect, so an adapter keeps the sessions apart. A reply that is missing, another session's or
another step's fails the run.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Rounding of sums in another order, as in the tests.
TOLERANCE = 3e-6
LOUDER = "head/output/arm/fc3/kernel"
NAMES = ("off", "on")  # whether our server batches
SIZES = {"quickstart": 32, "midsize": 224}  # pixels: what the vision towers take


def observe(session: int, step: int, size: int = 32) -> dict[str, Any]:
    """What a session sees at a step; differs for each of them."""
    rng = np.random.default_rng((session, step))
    keys = ("observation/image", "observation/wrist_image")
    images = {key: rng.integers(0, 256, (size, size, 3), np.uint8) for key in keys}
    return {**images, "prompt": f"lift the {('red', 'blue', 'pink')[session % 3]} block"}


def save(folder: Path, kind: str = "quickstart") -> None:
    """Write an architecture with random weights as a checkpoint; the same weights every time."""
    import jax

    from bench import fixed_step
    from configs import quickstart
    from vla_jax import rules
    from vla_jax.config import resolve, to_dict
    from vla_jax.convert import store
    from vla_jax.convert.tensors import Lazy
    from vla_jax.data.language.tokenizer import Tokenizer
    from vla_jax.data.units.normalize import ActionSpec
    from vla_jax.models import vla

    config = resolve(quickstart.get_config() if kind == "quickstart" else fixed_step.midsize())
    model = vla.build(config.model)
    params = jax.jit(lambda key: vla.initial_params(model, key))(jax.random.key(0))
    arrays = {path: np.asarray(x) for path, x in rules.flatten(params).items()}
    # An untrained policy says almost the same to everybody: a crossed reply would not be seen.
    arrays[LOUDER] = 10.0 * arrays[LOUDER]
    leaves = {path: Lazy(x.shape, x.dtype, lambda x=x: x) for path, x in arrays.items()}
    prompt = vla.prompt(config.model)
    texts = [prompt.format(instruction=observe(i, 0, 1)["prompt"]) for i in range(3)]
    ones = (1.0,) * 6
    spec = ActionSpec(7, "none", 1.0, tuple(-x for x in ones), ones, (-1.0, 1.0), hz=10.0)
    meta = {
        "config": to_dict(config),
        "tokenizer": Tokenizer.build(texts, model.word_ids).to_json(),
        "action_specs": {"random": spec.to_json()},
        "statistics": {},
    }
    store.write(folder, leaves, meta)


def make_policy(max_batch: int, kind: str = "quickstart") -> Any:
    """What `save` writes, loaded as a server loads it."""
    from vla_jax.inference.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), kind)
        return Policy.from_checkpoint(folder, max_batch=max_batch)


class Sessions:
    """The policy as openpi's server takes one: observations in, replies out, one at a time."""

    def __init__(self, policy: Any):
        """Nobody has connected yet."""
        self._policy, self._sessions = policy, {}

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """A reply to an observation that says whose it is."""
        number = observation.pop("session")
        session = self._sessions.get(number) or self._policy.new_session()
        reply, self._sessions[number] = self._policy.infer(session, observation)
        return {"actions": reply["actions"]}


@contextlib.contextmanager
def openpi_server(policy: Any, checkout: Path) -> Iterator[str]:
    """Openpi's server in a thread of its own, as its scripts start it; its address."""
    for folder in ("src", "packages/openpi-client/src"):
        sys.path.insert(0, str(checkout / folder))
    # By its file: its package imports what training needs.
    file = checkout / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("websocket_policy_server", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = module.WebsocketPolicyServer(Sessions(policy), "127.0.0.1", port, {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.05)
    yield f"ws://127.0.0.1:{port}"


def alone(policy: Any, sessions: int, steps: int, size: int) -> np.ndarray:
    """Every reply of every episode, one observation at a time: [sessions, steps, f, a]."""
    replies = []
    for i in range(sessions):
        session, episode = policy.new_session(), []
        for step in range(steps):
            reply, session = policy.infer(session, observe(i, step, size))
            episode.append(reply["actions"])
        replies.append(episode)
    return np.array(replies)


def clients(pipe: Connection, uri: str, expected: np.ndarray, think: float, size: int) -> None:
    """All sessions, in a process of their own; sends (milliseconds [sessions, steps], errors)."""
    pipe.send(asyncio.run(_clients(uri, expected, think, size)))


async def _clients(uri: str, expected: np.ndarray, think: float, size: int) -> tuple[Any, Any]:
    from websockets.asyncio.client import connect

    from vla_jax.serve import msgpack_numpy

    sessions, steps = expected.shape[:2]
    milliseconds, errors = np.full((2, sessions, steps), np.inf)
    ready = asyncio.Barrier(sessions)

    async def session(i: int) -> None:
        async with connect(uri, compression=None, max_size=None, proxy=None) as ws:
            await ws.recv()
            observations = [observe(i, step, size) | {"session": i} for step in range(steps)]
            messages = [msgpack_numpy.pack(observation) for observation in observations]
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


def measure(
    serving: contextlib.AbstractContextManager[str], expected: np.ndarray, think: float, size: int
) -> dict[str, Any]:
    """One server, one process of clients."""
    sessions, steps = expected.shape[:2]
    spawn = multiprocessing.get_context("spawn")
    mean_batch = 1.0
    with serving as uri:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=clients, args=(theirs, uri, expected, think, size))
        process.start()
        theirs.close()
        try:
            milliseconds, errors = ours.recv()
        except EOFError:
            sys.exit("the clients failed; see their error above")
        process.join()
        # openpi's server has no such page, and takes observations one by one.
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"http{uri.removeprefix('ws')}/metrics") as page,
        ):
            lines = page.read().decode().splitlines()
            samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            passes = float(samples["vla_batch_size_count"])
            mean_batch = float(samples["vla_batch_size_sum"]) / passes
    # In lockstep the slowest session's episode is the length of the run.
    seconds = (milliseconds.sum(axis=1) / 1e3 + think * steps).max()
    return {
        "replies": int(np.isfinite(errors).sum()),
        "wrong": int((~(errors <= TOLERANCE)).sum()),
        "max_error": float(errors.max()),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "replies_per_s": sessions * steps / seconds,
        "mean_batch": mean_batch,
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
    add("--model", choices=SIZES, default="quickstart", help="default: %(default)s")
    add("--openpi", type=Path, metavar="CHECKOUT", help="also measure openpi's own server")
    flags = parser.parse_args()
    logging.getLogger("websockets").setLevel(logging.WARNING)  # a line for every session
    from vla_jax.serve import server

    size = SIZES[flags.model]
    off, on = make_policy(1, flags.model), make_policy(flags.max_batch, flags.model)
    expected = alone(off, flags.sessions, flags.steps, size)
    apart = np.abs(expected[:, None] - expected[None, :]).max(axis=(-1, -2))
    apart[np.arange(flags.sessions), np.arange(flags.sessions)] = np.inf
    if apart.min() <= 100 * TOLERANCE:
        sys.exit("two sessions expect the same reply: a crossed one would not be seen")

    def serving(name: str) -> contextlib.AbstractContextManager[str]:
        if name == "openpi":
            return openpi_server(off, flags.openpi)
        wait = flags.max_wait_ms / 1e3 if name == "on" else 0.0
        options = server.ServerOptions(port=0, max_sessions=flags.sessions, max_wait=wait)
        return server.background(on if name == "on" else off, options)

    rounds: list[dict[str, Any]] = []
    for number in range(flags.rounds):
        for name in (*NAMES, *(["openpi"] if flags.openpi else [])):
            measured = measure(serving(name), expected, flags.think_ms / 1e3, size)
            rounds.append({"batching": name, "round": number, **measured})
            print(json.dumps(rounds[-1]), flush=True)
    print(table(rounds))
    if flags.json:
        path = Path(flags.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        content = {"flags": vars(flags), "rounds": rounds}
        beside.write_text(json.dumps(content, indent=1, default=str))
        os.replace(beside, path)
    wanted = flags.sessions * flags.steps
    if any(r["wrong"] or r["replies"] != wanted for r in rounds):
        sys.exit("replies were lost, or were not those of their session")


def table(rounds: list[dict[str, Any]]) -> str:
    """The median round of each kind, as Markdown."""
    keys = ("p50_ms", "p99_ms", "replies_per_s", "mean_batch")
    lines = ["| batching | p50, ms | p99, ms | replies/s | mean batch | wrong |", "|---" * 6 + "|"]
    for name in dict.fromkeys(r["batching"] for r in rounds):
        of_name = [r for r in rounds if r["batching"] == name]
        cells = [f"{np.median([r[key] for r in of_name]):.1f}" for key in keys]
        wrong = sum(r["wrong"] for r in of_name)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {wrong} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
