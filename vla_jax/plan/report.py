"""A plan in words, and as JSON."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from vla_jax.plan.compiled import EFFICIENCY, Work
from vla_jax.plan.machines import Machine
from vla_jax.plan.measured import Control, Measured, largest_batch
from vla_jax.plan.outline import Outline
from vla_jax.train.chips import Chip

_GIB = 2**30
CONVENTION = (
    "MFU = 3 x forward matmul FLOPs (attention included, recomputation not) / (step time x bf16 "
    f"peak); step time = max(compute, HBM, wire) / {EFFICIENCY}"
)


def to_json(
    machine: Machine,
    outline: Outline,
    train: Measured | None = None,
    control: Control | None = None,
) -> dict[str, Any]:
    """The plan as plain numbers; what only a compiler knows is null without one.

    Keys: "fits", "bytes_per_device" (by kind, with "total"; without a compiler the least that it
    can be), "flops" a device and step, "hbm_bytes", "wire_bytes", "step_seconds", "mfu",
    "largest_batch", "unsplit_carries", and "control", the same of a control step.
    """
    chip, least = machine.chip, outline.least_bytes
    plan: dict[str, Any] = {
        "topology": machine.name,
        "devices": machine.size,
        "processes": machine.processes,
        "mesh": outline.mesh,
        "batch_size": outline.rows,
        "row_blocks": outline.blocks,
        "straddling_row_blocks": outline.straddling,
        # Without a compiler only a misfit is certain: the least is already too much.
        "fits": None if least["total"] <= chip.memory else False,
        "bytes_per_device": least,
        "flops": outline.flops,
        "flops_forward": outline.forward,
        "residuals": outline.residuals,
        "unsplit_carries": outline.unsplit,
        **_compiled(train, chip),
        "mfu": None,
        "largest_batch": None,
        "convention": CONVENTION,
    }
    if train:
        plan["fits"], plan["bytes_per_device"] = train.fits, _kinds(outline, train)
        plan["largest_batch"] = largest_batch(outline, train, machine)
        if train.roofline:
            plan["mfu"] = train.roofline.mfu(outline.forward, chip)
    if control:
        plan["control"] = {
            "fits": control.fits,
            "sessions": control.sessions,
            "bytes_per_device": control.memory,
            "weights": control.weights,
            "history": control.history,
            "kernels": control.work.kernels if control.work else None,
            **_compiled(control, chip),
        }
    return plan


def _kinds(outline: Outline, train: Measured) -> dict[str, int]:
    return {**outline.state, **train.memory}


def _compiled(measured: Measured | None, chip: Chip) -> dict[str, Any]:
    work = measured.work if measured else None
    time = measured.roofline if measured else None
    return {
        "flops_compiled": work.flops if work else None,
        "hbm_bytes": work.hbm_bytes if work else None,
        "hbm_classes": work.classes if work else None,
        "wire_bytes": work.wire_bytes if work else None,
        "collectives": exchanges(work) if work else None,
        "step_seconds": time.seconds if time else None,
        "roofline_seconds": vars(time) if time else None,
        "bound": time.bound if time else None,
        "compile_seconds": round(measured.seconds, 1) if measured else None,
    }


def exchanges(work: Work) -> list[dict[str, Any]]:
    """Collectives of one kind, place and size as one row, the most bytes first."""
    # Layers repeat the same exchange, which would fill pages.
    rows: dict[Any, list[float]] = defaultdict(lambda: [0, 0.0])
    for each in work.exchanges:
        key = (each.kind, each.axes, each.group, each.array, each.loops, each.overlapped)
        rows[key][0] += each.executions
        rows[key][1] += each.wire_bytes
    merged = [
        {
            "kind": kind,
            "axes": list(axes),
            "group": group,
            "array": array,
            "loops": list(loops),
            "overlapped": overlapped,
            "executions": int(count),
            "wire_bytes": size,
        }
        for (kind, axes, group, array, loops, overlapped), (count, size) in rows.items()
    ]
    return sorted(merged, key=lambda row: -row["wire_bytes"])


def lines(machine: Machine, outline: Outline) -> Iterator[str]:
    """What is known without a compiler."""
    chip, mesh = machine.chip, outline.mesh
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    total, trained = (count / 1e6 for count in outline.parameters)
    yield (
        f"{machine.name}: {machine.size} x {chip.kind} in {machine.processes} processes, "
        f"{chip.memory / _GIB:g} GiB each; mesh {shape}"
    )
    each = " or ".join(map(str, outline.blocks_of_process))
    yield (
        f"batch of {outline.rows} windows in {outline.blocks} row blocks of {outline.windows:g}; "
        f"{each} blocks a process"
    )
    if outline.straddling:
        yield (
            f"FAULT: {outline.straddling} row blocks lie in several processes, which would feed "
            "them different windows"
        )
    yield f"parameters: {total:.0f} M, of which {trained:.0f} M train"
    windows = outline.windows
    yield (
        f"a device's step: {outline.flops / 1e12:.4g} TFLOP, {outline.flops / outline.forward:.2f}"
        f" x its forward pass; {outline.flops / chip.flops:.3g} s at the peak; "
        f"{_per_window(outline):.4g} TFLOP forward a window"
    )
    yield f"bytes a device, at least ({windows:g} windows):"
    yield from _table({name: size for name, size in outline.least_bytes.items() if size})
    # What is below a MiB decides nothing, and there is a lot of it.
    large = {name: size for name, size in outline.residuals.items() if size > 2**20}
    if large:
        yield "  of the residuals:"
        yield from ("  " + line for line in _table(large))
    # Small values would hide the few that decide whether a step fits.
    for dtype, shape, size in (each for each in outline.largest[:4] if each[2] > 2**24):
        yield f"  large value {dtype}{list(shape)}: {size / _GIB:.2f} GiB if split"
    if outline.unsplit:
        yield f"FAULT: {len(outline.unsplit)} loop values with all rows on every device:"
        yield from (f"  {value}" for value in outline.unsplit[:8])
    elif outline.blocks > 1:
        yield "every loop's rows are split"


def _per_window(outline: Outline) -> float:
    size = 1
    for each in outline.mesh.values():
        size *= each
    return outline.forward * size / outline.rows / 1e12


def train_lines(machine: Machine, outline: Outline, train: Measured) -> Iterator[str]:
    """What the compiler says of the train step."""
    yield f"train step, compiled in {train.seconds:.0f} s"
    yield from _fit_lines(machine, train)
    batch = largest_batch(outline, train, machine)
    yield f"  largest batch that fits, at the least: {batch} windows"
    if train.work and train.roofline:
        # Two counts that are made independently; far from 1, one has missed a loop or its turns.
        ratio = train.work.flops / outline.flops
        yield f"  {train.work.flops / 1e12:.1f} TFLOP a device, {ratio:.3f} of the trace's count"
        yield from _work_lines(train)
        mfu = train.roofline.mfu(outline.forward, machine.chip)
        rate = outline.rows / train.roofline.seconds
        yield f"  MFU {100 * mfu:.1f} %, {rate:.0f} windows a second"
        yield f"  {CONVENTION}"


def control_lines(machine: Machine, control: Control) -> Iterator[str]:
    """What the compiler says of the control step."""
    yield f"control step of {control.sessions} session(s) on one device"
    yield from _fit_lines(machine, control)
    history = control.history / 1e6
    yield f"  weights {control.weights / 1e9:.2f} GB, a session's history {history:.2f} MB"
    if control.work:
        # No step with one session can be faster than this.
        once = 1e3 * control.weights / machine.chip.bandwidth
        yield f"  {control.work.kernels} kernels; to read the weights once takes {once:.2f} ms"
        yield from _work_lines(control)


def _fit_lines(machine: Machine, measured: Measured) -> Iterator[str]:
    total, limit = measured.memory["total"] / _GIB, machine.chip.memory / _GIB
    word = "fits" if measured.fits else "DOES NOT FIT"
    yield f"  {word}: {total:.2f} GiB of {limit:g}"
    yield from ("  " + line for line in _table(measured.memory))


def _work_lines(measured: Measured) -> Iterator[str]:
    work, time = measured.work, measured.roofline
    if work is None or time is None:
        return
    yield f"  HBM {work.hbm_bytes / 1e9:.1f} GB"
    for name, size in work.classes.items():
        # Parts below a hundredth do not decide anything.
        if size > 0.01 * work.hbm_bytes:
            yield f"    {name:28} {size / 1e9:9.2f} GB {100 * size / work.hbm_bytes:5.1f} %"
    yield f"  wire {work.wire_bytes / 1e9:.2f} GB"
    # They come sorted by bytes, so what is cut off matters least.
    for row in exchanges(work)[:10]:
        axes, where = "x".join(row["axes"]), "".join(f" x{n}" for n in row["loops"])
        how = "hidden" if row["overlapped"] else "waited for"
        yield (
            f"    {row['kind']:18} {axes} ({row['group']}) {row['executions']:5} times "
            f"{row['wire_bytes'] / 1e9:8.3f} GB {how:10} {row['array']}"
            + (f" in a loop{where}" if where else "")
        )
    yield (
        f"  at the peaks: compute {time.compute:.4f} s, HBM {time.hbm:.4f}, wire {time.wire:.4f}; "
        f"bound by {time.bound}, {time.seconds:.4f} s expected"
    )


def _table(sizes: dict[str, int]) -> Iterator[str]:
    for name, size in sizes.items():
        yield f"  {name:28} {size / _GIB:9.3f} GiB"
