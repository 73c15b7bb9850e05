"""Compilers for machines that are not here: topologies of TPUs and GPUs without a device.

libtpu compiles for any TPU and the CUDA plugin for any GPU on any Linux machine, neither needs an
accelerator or a driver. Both come with the extra [plan], each by itself with what `devices` names.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from vla_jax.plan.machines import Machine, PlanError

# What each compiler is made of -> what installs it, in jax's own version.
_PACKAGES = {
    "tpu": {"libtpu": "jax[tpu]"},
    "cuda": {name: name for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")},
}
# Read when the plugin is loaded: no metadata server is asked, no other process holds the library,
# and no driver's or library's version is looked for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
# Triton's products are chosen by timing them, which takes a GPU; cuBLAS's are not.
OPTIONS: dict[str, dict[str, Any]] = {"tpu": {}, "cuda": {"xla_gpu_enable_triton_gemm": False}}
# But Triton's alone read whole numbers: before cuBLAS's they are written out as bfloat16. Into how
# many parts such a product's sum is cut is chosen by timing as well; by default it would be four,
# each written out in float32.
WHOLE_NUMBERS: dict[str, dict[str, Any]] = {
    "tpu": {},
    "cuda": {"xla_gpu_enable_triton_gemm": True, "xla_gpu_experimental_force_split_k": 1},
}


@dataclass(frozen=True)
class _Die:
    """A GPU as its compiler wants it described."""

    major: int
    cores: int
    shared: int
    shared_optin: int
    cache: int
    clock: float
    fpus: int
    minor: int = 0
    threads: int = 2048


_HOPPER = _Die(9, 132, 233472, 232448, 52428800, 1.98, 128)
_DIES = {
    "a100": _Die(8, 108, 167936, 166912, 41943040, 1.41, 64),
    "h100": _HOPPER,
    "h200": _Die(9, 132, 233472, 232448, 62914560, 1.98, 128),
    "rtx4090": _Die(8, 128, 102400, 101376, 75497472, 2.52, 128, 9, 1536),
    "l4": _Die(8, 58, 102400, 101376, 50331648, 2.04, 128, 9, 1536),
}
_CUDNN, _CUDA = (9, 20, 0), (13, 0, 0)


def devices(machine: Machine) -> list[Any]:
    """The compiler's devices of a machine, numbered as the machine itself would.

    Raises:
        PlanError: the compiler is not installed, or knows no such machine.
    """
    platform = machine.chip.platform
    missing = [name for name in _PACKAGES[platform] if not _installed(name)]
    if missing:
        # Not the whole extra: its other half is of no use to this machine.
        wanted = [f"'{_PACKAGES[platform][name]}=={jax.__version__}'" for name in missing]
        raise PlanError(
            f"--compile for {machine.name} needs {' and '.join(missing)}, not installed here: "
            f"pip install {' '.join(wanted)}"
        )
    for name, value in _ENVIRONMENT.items():
        # A user's own setting goes first.
        os.environ.setdefault(name, value)
    try:
        topology = _tpu(machine) if platform == "tpu" else _gpu(machine)
    except Exception as error:  # the runtime's own types, which differ between versions
        reason = str(error).strip().splitlines()[0]
        raise PlanError(f"--compile for {machine.name}: its compiler refuses: {reason}") from error
    return list(topology.devices)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _tpu(machine: Machine) -> Any:
    options: dict[str, Any] = {}
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if machine.family == "v4":  # two cores that act as one device
        options["chip_config_name"] = "megacore"
    if set(machine.shape) == {1}:  # else hosts have 2 x 2 chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    shape = "x".join(map(str, machine.shape))
    name = f"{machine.family}:{shape}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def _gpu(machine: Machine) -> Any:
    hosts = machine.processes
    return topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=_target(machine),
        topology=f"1x{hosts}x{machine.size // hosts}",
    )


@contextlib.contextmanager
def answering_for(machine: Machine) -> Iterator[None]:
    """Trace, lower and compile in this context.

    jax asks the GPU of its own process what cuDNN and the chip can do, while it traces an attention
    kernel and while XLA partitions it; here the machine that is planned for answers.
    """
    die = _DIES.get(machine.family)
    if die is None:
        yield
        return
    # jax compares capabilities as (major, minor).
    has, (major, minor, patch) = (die.major, die.minor), _CUDNN

    def at_least(wanted: str) -> bool:
        return has >= tuple(map(int, wanted.split(".")))

    def exactly(wanted: str) -> bool:
        return has == tuple(map(int, wanted.split(".")))

    answers = {
        "check_cudnn_version": lambda: 10000 * major + 100 * minor + patch,
        "check_compute_capability": at_least,
        "is_cuda_compute_capability_equal": exactly,
    }
    # Put back afterwards, for code that runs on a real GPU of this process.
    asked = {name: getattr(cudnn, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(cudnn, name, answer)
        yield
    finally:
        for name, function in asked.items():
            setattr(cudnn, name, function)


def _target(machine: Machine) -> str:
    """What the CUDA compiler asks of a device, as text of XLA's GpuTargetConfigProto."""
    die, chip = _DIES[machine.family], machine.chip
    dnn, runtime = (f"{{ major: {a} minor: {b} patch: {c} }}" for a, b, c in (_CUDNN, _CUDA))
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": die.shared,
        "threads_per_core_limit": die.threads,
        "core_count": die.cores,
        "fpus_per_core": die.fpus,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": die.cache,
        "clock_rate_ghz": die.clock,
        "device_memory_size": int(chip.memory),
        "shared_memory_per_block_optin": die.shared_optin,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    listing = " ".join(f"{name}: {value}" for name, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {die.major} minor: {die.minor} }}"
    return (
        f"gpu_device_info {{ {listing} {capability} }} "
        f'platform_name: "CUDA" dnn_version_info {dnn} runtime_version {runtime} '
        f'device_description_str: "{chip.kind}"'
    )


def compiled(lowered: Any, machine: Machine, options: dict[str, Any] | None = None) -> Any:
    """Compile a lowered step for a machine, with the options that need no device to be there.

    Args:
        lowered: the step.
        machine: it is for.
        options: that it would be compiled with anyway.
    """
    everything = {**OPTIONS[machine.chip.platform], **(options or {})}
    return lowered.compile(compiler_options=everything or None)


def prepare() -> None:
    """Compute nothing on an accelerator that happens to be here: planning needs none."""
    jax.config.update("jax_platforms", "cpu")
