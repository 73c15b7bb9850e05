"""ResNet trunk of OFA: three bottleneck stages with frozen batch-norm statistics.

Legend: b batch · h, x image height and width · i, o channels in and out · d channels of the output

Source: OFA-Sys/OFA models/ofa/resnet.py, which is torchvision's ResNet v1.5 without its fourth
stage and classifier. The running statistics are plain parameters that get no gradient: a robot's
small, correlated batches are no base for new ones.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import sharding
from vla_jax.models import weights as w
from vla_jax.models.towers.block import remat
from vla_jax.models.whole_numbers import brought_back

# `resnet_type` of an OFA config -> blocks in each stage. All use bottlenecks, resnet18 too.
DEPTHS: dict[str, tuple[int, int, int]] = {
    "resnet18": (2, 2, 2),
    "resnet34": (3, 4, 6),
    "resnet50": (3, 4, 6),
    "resnet101": (3, 4, 23),
    "resnet152": (3, 8, 36),
}
EXPANSION = 4  # a stage's output channels over its bottleneck's


@dataclass(frozen=True)
class ResNetSpec:
    """Shape of the trunk.

    Attributes:
        depths: blocks in each of the three stages; a value of `DEPTHS`.
        stem: channels of the first convolution and of the first stage's bottlenecks; doubled from
            stage to stage.
        eps: of the batch norms.
    """

    depths: tuple[int, int, int]
    stem: int = 64
    eps: float = 1e-5

    @property
    def width(self) -> int:
        """Channels of the output."""
        return self.stem * 4 * EXPANSION


class Conv(nn.Module):
    """Bias-free convolution, padded by half the kernel; kernel [k, k, i, o]."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h x i"]) -> Float[Array, "b _ _ o"]:
        """Channels last, in and out."""
        # He's variance suits the ReLU behind every norm; fan-out as in torchvision.
        he = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        kernel = self.param("kernel", he, (self.size, self.size, x.shape[-1], self.features))
        product = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            # Torch's padding: "SAME" would shift strided convolutions by a pixel.
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return brought_back(self, product, "kernel")

    def kernels(self) -> dict[str, int]:
        """The names of the kernels -> how many of their axes are inputs."""
        return {"kernel": 3}


class FrozenBatchNorm(nn.Module):
    """Batch normalization by stored statistics: `scale` and `bias` train, the rest does not."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b i"]:
        """Normalize every channel, then scale and shift."""
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        # Training must not change the stored statistics.
        mean = jax.lax.stop_gradient(self.param("mean", zeros, shape))
        var = jax.lax.stop_gradient(self.param("var", ones, shape))
        # The statistics are folded into one factor and one shift, both made in float32.
        scale = scale * jax.lax.rsqrt(var + self.eps)
        return x * scale.astype(self.dtype) + (bias - mean * scale).astype(self.dtype)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (with the stride), 1x1 up, beside an identity or a projecting shortcut."""

    features: int
    stride: int = 1
    project: bool = False
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h x i"], _: None = None) -> tuple[Array, None]:
        """One block, in the (carry, output) form that `nn.scan` wants."""

        def conv(x: Array, name: str, *shape: int) -> Array:
            x = Conv(*shape, dtype=self.dtype, name=f"conv{name}")(x)
            return FrozenBatchNorm(self.eps, self.dtype, name=f"norm{name}")(x)

        x, wide = sharding.rows(x), self.features * EXPANSION
        y = jax.nn.relu(conv(x, "1", self.features, 1))
        y = jax.nn.relu(conv(y, "2", self.features, 3, self.stride))
        y = conv(y, "3", wide, 1)
        shortcut = conv(x, "_short", wide, 1, self.stride) if self.project else x
        return sharding.rows(jax.nn.relu(shortcut + y)), None


class ResNet(nn.Module):
    """Images -> a grid of features at a sixteenth of their size.

    The first block of a stage changes the shape and stands alone; the rest are one scan.
    """

    spec: ResNetSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h x 3"]) -> Float[Array, "b _ _ d"]:
        """Normalized images -> [b, h / 16, x / 16, 16 * stem]."""
        s = self.spec
        x = Conv(s.stem, 7, 2, self.dtype, name="conv")(sharding.rows(images))
        x = jax.nn.relu(FrozenBatchNorm(s.eps, self.dtype, name="norm")(x))
        # Torch pads by one on each side; "SAME" would pad an even image on one side only.
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # type: ignore[arg-type]
        block = remat(Bottleneck, self.remat)
        for i, depth in enumerate(s.depths):
            shape: dict[str, Any] = {"features": s.stem << i, "eps": s.eps, "dtype": self.dtype}
            # The stem has shrunk the image by 4 already; two stages make it 16.
            stride = 1 if i == 0 else 2
            x, _ = block(stride=stride, project=True, name=f"stage{i + 1}_first", **shape)(x)
            if depth > 1:
                later_blocks = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=nn.broadcast,  # type: ignore[arg-type]
                    length=depth - 1,
                )
                x, _ = later_blocks(name=f"stage{i + 1}_rest", **shape)(x, None)
        return x


def weight_map(spec: ResNetSpec, source: str, target: str) -> list[w.Weight]:
    """The trunk under OFA's and torchvision's names; `num_batches_tracked` carries nothing.

    Args:
        spec: depths of the stages.
        source: up to and with the dot before `conv1`.
        target: up to and with the slash before `conv`.
    """
    rows = _unit("conv1", "bn1", "conv", "norm")
    for i, depth in enumerate(spec.depths, start=1):
        block = [row for j in "123" for row in _unit(f"conv{j}", f"bn{j}", f"conv{j}", f"norm{j}")]
        short = _unit("downsample.0", "downsample.1", "conv_short", "norm_short")
        rows += w.prefixed([*block, *short], f"layer{i}.0.", f"stage{i}_first/")
        if depth > 1:
            later_rows = w.prefixed(block, f"layer{i}.{{}}.", f"stage{i}_rest/")
            # Block 0 stands alone, so the stack begins with their block 1.
            rows += [replace(row, first=1) for row in later_rows]
    return w.prefixed(rows, source, target)


def _unit(conv: str, norm: str, our_conv: str, our_norm: str) -> list[w.Weight]:
    statistics = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [
        w.Weight(conv + ".weight", our_conv + "/kernel", "convolution"),
        *(w.Weight(f"{norm}.{a}", f"{our_norm}/{b}") for a, b in statistics.items()),
    ]
