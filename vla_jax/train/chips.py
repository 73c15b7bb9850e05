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


_TERA, _GIGA, _GIB = 1e12, 1e9, 2.0**30


def _tpu(kind: str, figures: tuple[float, ...], rank: int, largest: int, cores: int = 1) -> Chip:
    """Hosts of every TPU here have four chips."""
    tflops, bandwidth, gib, link, network = figures
    return Chip(
        "tpu", kind, tflops * _TERA, bandwidth * _GIGA, gib * _GIB, link * _GIGA,
        network * _GIGA, cores, rank, largest, 4 * cores,
    )  # fmt: skip


def _gpu(kind: str, figures: tuple[float, ...]) -> Chip:
    """Eight a host, NVLink between them, one 400 Gbit/s adapter each to other hosts."""
    tflops, bandwidth, gib, link = figures
    return Chip(
        "cuda", kind, tflops * _TERA, bandwidth * _GIGA, gib * _GIB, link * _GIGA, 50 * _GIGA,
        host=8,
    )  # fmt: skip


# TFLOP/s, GB/s of memory, GiB that the compiler lets a program have (a little less than the data
# sheet's), GB/s of links, GB/s of network.
CHIPS = {
    "v4": _tpu("TPU v4", (275.0, 1228.0, 32.0, 150.0, 6.25), 3, 4096),
    "v5e": _tpu("TPU v5 lite", (197.0, 819.0, 15.75, 100.0, 3.125), 2, 256),
    "v5p": _tpu("TPU v5", (459.0, 2765.0, 95.0, 300.0, 6.25), 3, 8960),
    "v6e": _tpu("TPU v6 lite", (918.0, 1640.0, 31.25, 200.0, 12.5), 2, 256),
    "tpu7x": _tpu("TPU7x", (1153.0, 3690.0, 96.0, 300.0, 6.25), 3, 9216, cores=2),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", (312.0, 2039.0, 79.0, 300.0)),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (989.0, 3352.0, 79.0, 450.0)),
    "h200": _gpu("NVIDIA H200", (989.0, 4814.0, 139.0, 450.0)),
    # The two of 24 GB that most labs have; they exchange over PCIe.
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (165.2, 1008.0, 23.5, 32.0)),
    "l4": _gpu("NVIDIA L4", (121.0, 300.0, 22.0, 32.0)),
}
