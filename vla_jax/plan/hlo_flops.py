"""Operations of the matrix products of a compiled program."""

import math
import re
from functools import cache

from vla_jax.plan.hlo import Computation, Instruction, Program, arrays

# Of jax's attention kernel for TPUs: passes by their name, and the products in each.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# Of our own for GPUs, whose compiler leaves out what a kernel says of itself.
_DROPPING = re.compile(r"dropping_(forward|query|key)_kernel")
_DROPPING_PRODUCTS = {"forward": 2, "query": 3, "key": 4}
_FLOATS = ("bf16", "f16", "f32")
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')


def flops(instruction: Instruction, computation: Computation, program: Program) -> int:
    """Operations of one instruction, and of what is fused into it."""
    total = _own(instruction, computation)
    if instruction.op in ("fusion", "async-start") and instruction.body:
        inner = program.get(instruction.body)
        total += sum(flops(each, inner, program) for each in inner.values())
    return total


def _own(instruction: Instruction, computation: Computation) -> int:
    shapes = [arrays(computation[x].shape) for x in instruction.operands if x in computation]
    first, out = (shapes[0][0].dims if shapes and shapes[0] else ()), arrays(instruction.shape)
    text = instruction.attributes
    if not out:
        return 0
    if instruction.op == "dot":
        matched = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
        return _product(out[0].dims, first, matched[1] if matched else "")
    if instruction.op == "convolution" and len(shapes) > 1:
        return _convolution(text, first, shapes[1][0].dims, out[0].dims)
    if instruction.op != "custom-call":
        return 0
    if "__cublas" in text or "__triton_gemm" in text:
        matched = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', text)
        return _product(out[0].dims, first, matched[1] if matched else "")
    if "__cudnn$fmha" in text and len(shapes) > 1:
        # q [b, n, h, d], k [b, m, h, d]: two products forward; five backward, which computes the
        # scores anew.
        products = 5 if "Backward" in text.split("metadata")[0] else 2
        return 2 * products * math.prod(first) * shapes[1][0].dims[1]
    if matched := _DROPPING.search(text):  # q [b, n, h, d], k [b, m, g, d]
        return 2 * _DROPPING_PRODUCTS[matched[1]] * math.prod(first) * shapes[1][0].dims[1]
    if matched := _ESTIMATE.search(text):  # what a kernel written in Pallas says of itself
        return int(matched[1])
    kernel = _SPLASH.search(instruction.name + text)
    if not kernel:
        return 0
    # Behind numbers of blocks q [b, h, n, d], k [b, g, m, d]; the scores are computed anew in each
    # pass. What a causal mask leaves out of a block is computed all the same.
    q, k = [array.dims for each in shapes for array in each if array.dtype in _FLOATS][:2]
    return 2 * _PRODUCTS[kernel[1]] * math.prod(q) * k[-2]


def _product(out: tuple[int, ...], left: tuple[int, ...], contracted: str) -> int:
    axes = [int(i) for i in re.findall(r"\d+", contracted)]
    # A multiplication and an addition for each pair of numbers that meet.
    return 2 * math.prod(out) * math.prod(left[i] for i in axes)


def _convolution(
    text: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> int:
    labels = re.search(r"dim_labels=(\S+?)_(\S+?)->([^\s,]+)", text)
    if not labels:
        return 0
    window = re.search(r"window=\{([^}]*)\}", text)
    options = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(c for c in labels[3] if c.isdigit())

    def of(key: str, default: str) -> list[str]:
        return options[key].split("x") if key in options else [default] * len(spatial)

    size, stride, pad = of("size", "1"), of("stride", "1"), of("pad", "0_0")
    spread, gap = of("lhs_dilate", "1"), of("rhs_dilate", "1")
    total = 2
    for i, label in enumerate(spatial):
        total *= _meetings(
            left[labels[1].index(label)], out[labels[3].index(label)], int(size[i]),
            int(stride[i]), int(pad[i].split("_")[0]), int(spread[i]), int(gap[i]),
        )  # fmt: skip
    # Each group of the batch makes only its own share of the output channels.
    groups = re.search(r"batch_group_count=(\d+)", text)
    channels = right[labels[2].index("i")] * right[labels[2].index("o")]
    return total * channels * left[labels[1].index("b")] // (int(groups[1]) if groups else 1)


@cache
def _meetings(
    length: int, out: int, size: int, stride: int, pad: int, spread: int, gap: int
) -> int:
    """How often the window meets a real input along one dimension.

    TPU compilers write products and gradients as convolutions whose windows lie mostly in padding.
    """
    end = (length - 1) * spread + 1
    positions = (o * stride + k * gap - pad for o in range(out) for k in range(size))
    return sum(0 <= p < end and p % spread == 0 for p in positions)
