"""Train with several processes on this machine, as on several machines.

    python launch/local.py --processes=2 --devices=4 -- --config=configs/quickstart.py --workdir=...
    python launch/local.py --processes=2 --gpus=8 -- --config=... --workdir=...

What follows -- goes to launch/train.py. With --devices every process has that many virtual CPU
devices, with --gpus the machine's GPUs are shared out. SIGTERM and SIGINT are handed on, so that
all save; when one process fails, the others are ended after a minute's grace. Exit status: of the
first process that failed, else 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax.commands import HelpFormatter, program

TRAIN = Path(__file__).resolve().with_name("train.py")
GRACE = 60.0  # seconds between the first failure and the end of the others


def main(argv: list[str] | None = None) -> int:
    """Start all, wait for all; returns the exit status."""
    flags = _parse_flags(argv)
    started: list[subprocess.Popen[Any]] = []

    def hand_on(number: int, _: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    with socket.socket() as free:
        # The system chooses a free port; it is let go before the first process listens there.
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for index in range(flags.processes):
        env = environment(index, flags.processes, address, flags.devices, flags.gpus, os.environ)
        # An installed package's files are modules, not scripts.
        train = ["-m", f"{__package__}.train"] if __package__ else [str(TRAIN)]
        command = [sys.executable, *train, *flags.train]
        # A session of its own: a terminal's Ctrl-C comes to each once, from here.
        started.append(subprocess.Popen(command, env=env, start_new_session=True))
    return wait(started)


def environment(
    index: int, count: int, address: str, devices: int, gpus: int, env: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables of one process.

    Args:
        index: of the process.
        count: processes in all.
        address: where the first one listens.
        devices: virtual CPU devices of each; 0 = as the machine has.
        gpus: of the machine, shared out; 0 = every process sees all.
        env: to add to.
    """
    variables = {
        **env,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        variables["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
        variables["JAX_PLATFORMS"] = "cpu"
    if gpus:
        per_process = gpus // count
        indices = range(index * per_process, (index + 1) * per_process)
        variables["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, indices))
    return variables


def wait(started: Sequence[subprocess.Popen[Any]], grace: float = GRACE) -> int:
    """Until all have ended; after a failure the others have `grace` seconds to end themselves."""
    status, until = 0, float("inf")
    while True:
        codes = [process.poll() for process in started]
        failed = next((code for code in codes if code), 0)
        if failed and not status:
            # The first failure is the cause, and later ones follow from it.
            status, until = failed, time.monotonic() + grace
            problem = f"{program()}: a process ended with status {failed}"
            print(problem, file=sys.stderr, flush=True)
        if None not in codes:
            return status if status >= 0 else 128 - status  # a signal's, as shells say it
        if time.monotonic() > until:
            for process in started:
                # What is left by now waits for a peer that will not come.
                process.kill()
        time.sleep(0.1)


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the machine, shared out")
    parser.add_argument("train", nargs="*", help="flags of launch/train.py, behind --")
    flags = parser.parse_args(argv)
    if flags.processes < 1:
        parser.error("--processes: at least 1")
    if flags.gpus % flags.processes:
        parser.error(f"--gpus: {flags.gpus} cannot be shared out to {flags.processes} processes")
    return flags


if __name__ == "__main__":
    sys.exit(main())
