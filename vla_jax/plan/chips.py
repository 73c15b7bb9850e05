"""What one device of each kind can do, from the makers' data sheets.

"Device" is what jax counts as one: a chip, but half a chip of tpu7x.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peak figures of one device.

    Attributes:
        platform: "tpu" or "cuda", the compiler that is needed.
        kind: what jax calls the device.
        flops: bf16 operations a second.
        bandwidth: bytes a second of its memory.
        memory: bytes of it that a program can have.
        link: bytes a second to its neighbors, one direction, all links together: ICI or NVLink.
        network: bytes a second to other slices (TPU) or hosts (GPU).
        cores: devices a chip.
        rank: dimensions of the torus; 0 where a machine is just so many devices.
        largest: chips of the largest slice; 0 where there is no end.
        host: devices of one host, which are one process.
    """

    platform: str
    kind: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    cores: int = 1
    rank: int = 0
    largest: int = 0
    host: int = 4


_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


def _tpu(
    kind: str,
    tflops: float,
    bandwidth: float,
    gib: float,
    link: float,
    network: float,
    rank: int,
    largest: int,
    cores: int = 1,
) -> Chip:
    """Hosts of every TPU here have four chips."""
    return Chip(
        "tpu", kind, tflops * _TERA, bandwidth * _GIGA, gib * _GIB, link * _GIGA,
        network * _GIGA, cores, rank, largest, 4 * cores,
    )  # fmt: skip


def _gpu(kind: str, tflops: float, bandwidth: float, gib: float, link: float) -> Chip:
    """Eight a host, NVLink between them, one 400 Gbit/s adapter each to other hosts."""
    return Chip(
        "cuda", kind, tflops * _TERA, bandwidth * _GIGA, gib * _GIB, link * _GIGA, 50 * _GIGA,
        host=8,
    )  # fmt: skip


# The memory is what the compiler lets a program have, a little less than the data sheet's.
CHIPS = {
    "v4": _tpu("TPU v4", 275, 1228, 32, 150, 6.25, 3, 4096),
    "v5e": _tpu("TPU v5 lite", 197, 819, 15.75, 100, 3.125, 2, 256),
    "v5p": _tpu("TPU v5", 459, 2765, 95, 300, 6.25, 3, 8960),
    "v6e": _tpu("TPU v6 lite", 918, 1640, 31.25, 200, 12.5, 2, 256),
    "tpu7x": _tpu("TPU7x", 1153, 3690, 96, 300, 6.25, 3, 9216, cores=2),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 312, 2039, 79, 300),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 989, 3352, 79, 450),
    "h200": _gpu("NVIDIA H200", 989, 4814, 139, 450),
}
