"""Serve a trained policy to robots and simulators.

    python launch/serve.py --checkpoint=runs/quickstart --port=8000

speaks openpi's websocket protocol, so `openpi_client.websocket_client_policy` and the clients in
`eval_servers/` connect unmodified; `POST /act` on the same port answers OpenVLA's clients. The
policy is compiled first; `listening on ws://...` means that clients can connect.
`curl http://127.0.0.1:8000/healthz` answers OK, `/metrics` what has been served. Ctrl-C stops it.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import garbage, refusal
from vla_jax.commands import HelpFormatter
from vla_jax.serve import server
from vla_jax.serve.transports import WIRES
from vla_jax.serve.transports.base import WebsocketWire
from vla_jax.train import checkpoint_folder


def main() -> int:
    """Parse flags, load, compile, serve; returns the exit status."""
    refusal.quiet_interrupt()
    garbage.collect_rarely()
    flags = _parse_flags()
    logging.basicConfig(
        level=logging.DEBUG if flags.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    if not flags.verbose:
        # Orbax's account of every restore, and jax's of every device that is not here.
        for chatty in ("websockets", "absl", "jax"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        options = server.ServerOptions(
            host=flags.host,
            port=flags.port,
            max_message_bytes=round(flags.max_message_mb * 2**20),
            max_sessions=flags.max_sessions,
            max_wait=flags.max_wait_ms / 1e3,
            idle_timeout=flags.idle_timeout,
            wire=flags.wire,
            new_episode=flags.new_episode,
            api_key=_api_key(flags.api_key_file),
        )
        # A port in use is reported now, not after minutes of loading.
        server.check_port(options.host, options.port)
        with refusal.naming("--checkpoint"):
            checkpoint_folder.locate(flags.checkpoint, read_only=True)
        if not options.api_key and flags.host not in ("127.0.0.1", "::1", "localhost"):
            logging.warning("--host=%s without an API key: anyone may connect", flags.host)
        refusal.check_devices()
        from vla_jax import compilation_cache
        from vla_jax.inference import robot_keys
        from vla_jax.inference.execution import Execution
        from vla_jax.inference.policy import Policy  # after the flags: --help need not wait for jax
        from vla_jax.train import heap

        # Before anything is compiled, or the first programs would not be kept.
        compilation_cache.enable(flags.compilation_cache)
        with refusal.naming("--observation"):
            keys = robot_keys.load(flags.observation) if flags.observation else None
        overrides = {"repeat": flags.gripper_repeat, "patience": flags.gripper_patience}
        policy = Policy.from_checkpoint(
            flags.checkpoint,
            step=flags.step,
            dataset=flags.dataset,
            untrained=flags.untrained,
            execution=Execution(
                flags.execute,
                flags.horizon,
                flags.ensemble_decay,
                guidance=flags.rtc,
                lost=flags.lost_chunk,
            ),
            # None leaves the checkpoint's own setting.
            gripper={f"gripper_{k}": v for k, v in overrides.items() if v is not None},
            # A batch for more sessions than may connect would be compiled in vain.
            max_batch=min(flags.max_batch, flags.max_sessions),
            observation=keys,
            weights=flags.weights,
        )
        # Added before the server starts, as every connection is answered by these metadata.
        if flags.unnorm_keys:
            policy.metadata["observation"]["aliases"] += flags.unnorm_keys.split(",")
        if flags.action_space:
            policy.metadata["observation"]["action_space"] = flags.action_space

        def listening(uri: str) -> None:
            garbage.collect_as_usual()
            # What reading and compiling have left is a fifth of a small policy's memory.
            heap.trim()
            # Flushed, since scripts wait for this line before they start clients.
            print(f"listening on {uri}", flush=True)

        server.run(policy, options, listening)
    except refusal.CAUSED as error:
        return refusal.tell(error, flags.debug)
    return 0


def _api_key(file: str | None) -> str:
    """The key, from a file or the environment: a command line is there for every user to read."""
    with refusal.naming("--api-key-file"):
        return Path(file).read_text("utf-8").strip() if file else os.environ.get("VLA_API_KEY", "")


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder that launch/train.py wrote")
    add("--port", type=int, default=8000, help="TCP port, 0 = any free one (default: 8000)")
    add(
        "--host",
        default="127.0.0.1",
        help="interface to listen on; 0.0.0.0 = all of them, and then anyone who can reach this"
        " machine and knows the API key, if there is one, can use the policy (default: 127.0.0.1,"
        " this machine only)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help="clients must send what this file holds as 'Authorization: Api-Key KEY', as openpi's"
        " client does (default: the environment's VLA_API_KEY; without one, no key)",
    )
    add("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    add(
        "--dataset",
        metavar="KEY",
        help="dataset whose statistics turn the network's output into robot units; needed when"
        " the checkpoint was trained on several",
    )
    add(
        "--observation",
        metavar="NAME|FILE",
        help="keys under which the robot sends its observations: openpi, libero, droid, roboarena,"
        " aloha, openvla, or a JSON file, see docs/your_robot.md (default: the checkpoint's)",
    )
    add(
        "--unnorm-keys",
        default="",
        metavar="NAMES",
        help="further names of the dataset, with commas between, that OpenVLA's clients may send",
    )
    add(
        "--weights",
        default="",
        choices=("bf16", "int8"),
        help="how weights are kept in memory. int8: the kernels of linear maps as whole numbers,"
        " with a scale for every output: half of what bfloat16 takes, and half to read at a step;"
        " bf16: bfloat16 (default: the type that the model computes in)",
    )
    add(
        "--untrained",
        action="store_true",
        help="random weights instead of the trained ones: the baseline of a comparison",
    )
    add(
        "--execute",
        default="chunk",
        choices=("chunk", "first", "ensemble", "receding", "rtc"),
        help="chunk: reply whole chunks, which the client replays; the others reply one action a"
        " step: first: the newest chunk's; ensemble: the mean of all chunks that reach this step;"
        " receding: --horizon actions of a chunk, then a new one; rtc: whole chunks that agree with"
        " what the client still executes of the last one, for clients that ask for the next chunk"
        " meanwhile (default: chunk)",
    )
    add(
        "--horizon",
        type=int,
        default=0,
        metavar="N",
        help="actions used of a chunk, with --execute=chunk or receding (default: 0, all)",
    )
    add(
        "--ensemble-decay",
        type=float,
        default=0.01,
        metavar="M",
        help="weight exp(-M i) of the chunk i steps younger than the oldest (default: 0.01)",
    )
    add(
        "--rtc",
        default="jacobian",
        choices=("jacobian", "direct"),
        help="with --execute=rtc, how chunks are made to agree: jacobian, as real-time chunking was"
        " published, takes a backward pass a denoising step; direct, as LeRobot does it, takes none"
        " and gives other actions (default: jacobian)",
    )
    add(
        "--lost-chunk",
        default="error",
        choices=("error", "zero", "last"),
        help="when a model that writes its actions has written no chunk. error: the client gets"
        " one; zero: the arm's numbers are 0, for actions that are motions; last: the last action"
        " again, for positions (default: error)",
    )
    add(
        "--gripper-repeat",
        type=int,
        metavar="N",
        help="the environment's gripper takes changes, each for N steps (SIMPLER's"
        " Google robot: 2)",
    )
    add(
        "--gripper-patience",
        type=int,
        metavar="N",
        help="open only after N decisions for open in a row (SIMPLER's WidowX: 2)",
    )
    add(
        "--max-message-mb",
        type=float,
        default=16.0,
        metavar="MIB",
        help="largest request; two 224x224 cameras take 0.3 (default: 16)",
    )
    add(
        "--max-sessions",
        type=int,
        default=64,
        metavar="N",
        help="clients at a time; each holds its own history (default: 64)",
    )
    add(
        "--wire",
        default="websocket",
        choices=[wire.name for wire in WIRES if issubclass(wire, WebsocketWire)],
        help="websocket clients that ask for no path of their own speak this: websocket is openpi's"
        " (default: websocket)",
    )
    add(
        "--action-space",
        choices=("joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity"),
        help="what the numbers of an action are, for RoboArena's clients, which ask",
    )
    add(
        "--new-episode",
        default="auto",
        metavar="auto|off|S",
        help="what begins an episode of a client that does not say so: auto: a long pause after"
        " which the robot is back where it began; S: that many seconds without a request; off:"
        " nothing (default: auto; docs/your_robot.md)",
    )
    add(
        "--idle-timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds without a request after which a session ends, 0 = never (default: 1800)",
    )
    add(
        "--max-batch",
        type=int,
        default=4,
        metavar="N",
        help="sessions that share one pass of the model; N and each power of two below is compiled"
        " before the server listens; 1 = no sharing (default: 4)",
    )
    add(
        "--max-wait-ms",
        type=float,
        default=5.0,
        metavar="MS",
        help="how long a request waits at most for sessions that are due to ask as well; a lone"
        " client never waits (default: 5)",
    )
    add(
        "--compilation-cache",
        default="auto",
        metavar="DIR",
        help="where compiled programs are kept for the next start: auto (JAX_COMPILATION_CACHE_DIR,"
        " else ~/.cache/vla_jax/xla), a folder, or off (default: auto)",
    )
    add("--verbose", action="store_true", help="log every frame")
    refusal.add_flag(parser)
    flags = parser.parse_args()
    # Judged here, where a mistake costs a second and not the loading of a model.
    if not 0 <= flags.port < 65536:
        parser.error(f"--port: {flags.port} is not in 0..65535")
    if flags.max_message_mb <= 0 or flags.max_sessions < 1 or flags.max_batch < 1:
        parser.error("--max-message-mb, --max-sessions and --max-batch: must be positive")
    if flags.max_wait_ms < 0 or flags.idle_timeout < 0:
        parser.error("--max-wait-ms and --idle-timeout: must not be negative")
    return flags


if __name__ == "__main__":
    sys.exit(main())
