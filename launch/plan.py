"""What a run would cost on a machine that is not here, before the machine is paid for.

    python launch/plan.py --config=configs/kosmos_ph.py --topology=v5e:8x8 --windows=4
    python launch/plan.py --config=... --topology=h100:8 --compile --json=plan.json
    python launch/plan.py --config=... --topology=2*v5e:8x8 --config.mesh.data=2
    python launch/plan.py --config=... --topology=h100:8 --sweep

Without --compile, in seconds: processes and row blocks, operations, the least memory of a device
by kind, and loops whose rows are not split. With it the train step and the control step are
compiled for that machine (no accelerator is needed, but `pip install -e '.[plan]'` and minutes):
whether they fit, bytes by class, exchanges between devices, the time to expect and MFU, and the
largest batch. --sweep tries meshes, rematerialization and batches and says which it would take.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import cli, refusal
from vla_jax.config import ConfigError, resolve
from vla_jax.plan import compilers, machines, measured, outline, report, sweep

CONFIG = config_flags.DEFINE_config_file("config")
TOPOLOGY = flags.DEFINE_string("topology", None, "Machine: v5e:8x8, 2*v5e:8x8, h100:8, ...")
WINDOWS = flags.DEFINE_integer(
    "windows", 0, "Windows of a row block instead of the batch size.", lower_bound=0
)
SESSIONS = flags.DEFINE_integer("sessions", 1, "Sessions of the control step.", lower_bound=1)
WEIGHTS = flags.DEFINE_enum("weights", "bf16", ["bf16", "int8"], "Of the control step, as served.")
COMPILE = flags.DEFINE_boolean("compile", False, "Compile both steps for the machine.")
SWEEP = flags.DEFINE_boolean("sweep", False, "Try meshes, remat and batches, and recommend.")
DEBUG = flags.DEFINE_boolean("debug", False, refusal.HELP)
JSON = flags.DEFINE_string("json", None, "File for the numbers.")


def plan() -> dict[str, Any]:
    """Print the plan; returns its numbers."""
    raw = cli.required(CONFIG.value)
    if not TOPOLOGY.value:
        raise machines.PlanError(f"--topology: name a machine; known: {machines.known()}")
    if JSON.value and not Path(JSON.value).parent.is_dir():
        raise machines.PlanError(f"--json={JSON.value}: there is no such folder")
    machine, config = machines.parse(TOPOLOGY.value), resolve(raw)

    # Many settings, each as cheap as it goes.
    if SWEEP.value:
        result = sweep.sweep(config, machine, compiled=COMPILE.value)
        _print(sweep.lines(result))
        return sweep.to_json(machine, result)

    # What takes no compiler.
    sketch = outline.outline(config, machine, WINDOWS.value)
    _print(report.lines(machine, sketch))
    if not COMPILE.value:
        return report.to_json(machine, sketch)

    # What takes one.
    train = measured.train_step(config, machine, WINDOWS.value)
    _print(report.train_lines(machine, sketch, train))
    control = measured.control_step(config, machine, SESSIONS.value, WEIGHTS.value)
    _print(report.control_lines(machine, control))
    return report.to_json(machine, sketch, train, control)


def _print(lines: Any) -> None:
    for line in lines:
        print(line, flush=True)


def main(_: Any) -> None:
    """Plan and write the numbers; a user's mistake shows no traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Before jax starts, which would look for the devices of this machine.
    compilers.prepare()
    try:
        numbers = plan()
        if JSON.value:
            Path(JSON.value).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    except (ConfigError, machines.PlanError, OSError) as error:
        sys.exit(refusal.tell(error, DEBUG.value))


if __name__ == "__main__":
    cli.run_with_flags(main)
