"""A config that compiles in seconds: the quickstart's, as narrow as it goes; and runs of it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from configs import quickstart

ROOT = Path(__file__).parents[2]


def get_config(data: str = "") -> Any:
    """For `launch/train.py --config=tests/train/mini.py:DATA`."""
    c = quickstart.get_config(data)
    arch = c.model.backbone.arch
    arch["vision_config"].update(
        hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1
    )
    arch["text_config"].update(embed_dim=32, layers=1, attention_heads=2, ffn_dim=32)
    c.model.structure.update({"kind": "one_step", "window": 1, "chunk": 2})
    c.model.head.update({"kind": "mlp", "hidden": 32, "layers": 1})
    c.optim.update({"muon": (), "rates": (), "learning_rate": 1e-3, "warmup_steps": 0})
    c.optim.schedule = "constant"
    c.train.update({"batch_size": 8, "log_every": 1, "eval_batches": 2, "save_every": 5})
    return c


def rows(workdir: Path, kind: str = "train") -> list[dict]:
    """The whole lines of a run's log so far."""
    path = workdir / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    results = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in results if row["kind"] == kind]


class Processes:
    """Several processes of one run on this machine, each with as many virtual devices."""

    def __init__(
        self,
        data: Path,
        workdir: Path,
        processes: int,
        devices: int,
        config: str = __file__,
        **flags: Any,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "launch/train.py", f"--config={config}:{data}"]
        command += [f"--workdir={workdir}"]
        command += [f"--config.{k.replace('__', '.')}={v}" for k, v in flags.items()]
        self.workdir = workdir
        self.outputs = [workdir.parent / f"{workdir.name}-{i}.txt" for i in range(processes)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            env = {
                **os.environ,
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                f"--xla_force_host_platform_device_count={devices}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
            with output.open("w", encoding="utf-8") as file:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, steps: int, seconds: float = 600) -> None:
        """Wait until so many steps are logged."""
        end = time.monotonic() + seconds
        while len(rows(self.workdir)) < steps:
            if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
                raise AssertionError("\n".join(self.said(i) for i in range(len(self.processes))))
            time.sleep(0.05)

    def wait(self, which: int = 0, seconds: float = 600) -> tuple[int, float]:
        """The exit status of a process, and the seconds until it was there."""
        began = time.monotonic()
        status = self.processes[which].wait(timeout=seconds)
        return status, time.monotonic() - began

    def said(self, which: int = 0) -> str:
        """What a process has printed."""
        return self.outputs[which].read_text(encoding="utf-8", errors="replace")
