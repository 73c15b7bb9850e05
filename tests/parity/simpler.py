"""RoboVLMs' wrapper for SimplerEnv: grippers with a memory, Euler angles, statistics."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval_servers.simpler.profiles import COMMANDS, PROFILES, GripperState, convert
from eval_servers.simpler.tasks import GOOGLE, WIDOWX
from tests.parity.table import Row, compare
from vla_jax.data.units.normalize import ActionSpec

# The policy's setup -> robot. The wrapper computes in float64 from float32 predictions.
ROBOTS = {"google_robot": GOOGLE, "widowx_bridge": WIDOWX}
ROUNDING = 1e-12
# 1 % and 99 % quantiles of the arm in its statistics files; ours answers in float32.
QUANTILES = {
    "fractal20220817_data": (
        (-0.22453527510166169, -0.14820013284683228, -0.231589707583189,
         -0.3517994859814644, -0.4193011274933815, -0.43643461108207704),
        (0.17824687153100965, 0.14938379630446405, 0.21842354819178575,
         0.5892666035890578, 0.35272657424211445, 0.44796681255102094),
    ),
    "bridge_orig": (
        (-0.02872725307941437, -0.04170349963009357, -0.026093858778476715,
         -0.08092105075716972, -0.09288699507713317, -0.20718276381492615),
        (0.028309678435325586, 0.040855254605412394, 0.040161586627364146,
         0.08192047759890528, 0.07792850524187081, 0.20382574498653397),
    ),
}  # fmt: skip
UNITS = 1e-7


def run(folder: Path) -> Iterator[Row]:
    """Every robot's steps, and every dataset's units."""
    arrays = np.load(folder / "io.npz")
    for name, robot in ROBOTS.items():
        if f"{name}/in" not in arrays.files:
            continue
        state, collected = GripperState(), []
        closed, opened = (COMMANDS[robot][key] for key in ("closed", "open"))
        for (predicted,) in arrays[f"{name}/in"]:
            # The original's gripper is 1 = open, 0 = closed.
            command = closed + float(predicted[6]) * (opened - closed)
            action = np.append(predicted[:6].astype(np.float64), command)
            array, state = convert(action, robot, PROFILES["robovlms"], state)
            collected.append(array)
        array = np.array(collected)
        parts = {
            "world_vector": array[:, :3],
            "rot_axangle": array[:, 3:6],
            "gripper": array[:, 6:],
        }
        for part, got in parts.items():
            yield compare(f"{name} {part}", got, arrays[f"{name}/{part}"], ROUNDING)
    for name, (low, high) in QUANTILES.items():
        if f"{name}/in" in arrays.files:
            spec = ActionSpec(7, "q99", 1.0, low, high, (0.0, 1.0))
            got = spec.unnormalize(arrays[f"{name}/in"])
            expected = arrays[f"{name}/out"]
            yield compare(f"{name} arm in its units", got[:, :6], expected[:, :6], UNITS)
