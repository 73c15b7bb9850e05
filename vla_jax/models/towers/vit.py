"""The vision transformer of every backbone.

Legend: b batch · f frames of a token · h, x image height and width · p patch · n tokens · d width
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import sharding
from vla_jax.models.towers import fused, positions
from vla_jax.models.towers.block import Block, BlockSpec, Stack, remat, stack
from vla_jax.models.towers.layers import NORMS, Dense


@dataclass(frozen=True)
class VisionSpec:
    """What a vision tower is made of.

    Attributes:
        width: of the tokens.
        layers: depth.
        block: of every layer.
        patch: side of a patch, pixels.
        grid: rows and columns of patches; the image is `patch` times that.
        frames: of a video that one token takes; a still image stands for all of them (Qwen2-VL).
        patch_bias: whether the patch embedding has one.
        class_token: a learned token stands before the patches.
        class_position: ... and has a position of its own.
        keep_class: ... and is among the result.
        registers: learned tokens behind the class token, without positions and never among the
            result (DINOv2, Darcet et al. 2024).
        table: grid of the learned positions; None = none. Where it is not `grid` it is resampled.
        resampling: how; a key of `positions.INTERPOLATIONS`.
        rope_theta: base of the rotation by row and column; 0 = none.
        pre_norm: a norm before the first layer.
        post_norm: a norm after the last.
        take: which hidden states are the result: -1 = after the last layer and the norm, -2 =
            after the layer before it, without the norm (LLaVA). Layers that nothing needs keep
            their parameters, so that a checkpoint comes out as it went in, but are not computed.
        taps: layers whose output is handed out too (Qwen3-VL's deepstack).
        window: side of the square windows of attention, patches; 0 = attention to all.
        full_layers: layers that attend to all in spite of `window`.

    Raises:
        ValueError: naming every combination that cannot be.
    """

    width: int
    layers: int
    block: BlockSpec
    patch: int
    grid: positions.Grid
    frames: int = 1
    patch_bias: bool = True
    class_token: bool = False
    class_position: bool = True
    keep_class: bool = True
    registers: int = 0
    table: positions.Grid | None = None
    resampling: str = "bicubic"
    rope_theta: float = 0.0
    pre_norm: bool = False
    post_norm: bool = False
    take: int = -1
    taps: tuple[int, ...] = ()
    window: int = 0
    full_layers: tuple[int, ...] = ()

    def __post_init__(self):
        problems = []
        if min(self.grid) <= 0:
            problems.append(f"grid: {self.grid} has no patches")
        if self.class_token and (self.rope_theta or self.window):
            problems.append("class_token: has no row and column to be rotated or windowed by")
        if self.registers and not self.class_token:
            problems.append("registers: stand behind a class token, which there is none of")
        if self.block.film and self.window:
            problems.append("block.film: its condition is of whole images, not of windows")
        if not -self.layers <= self.take <= -1:
            problems.append(f"take: {self.take} is none of -1 .. -{self.layers}")
        if any(not 0 <= i <= self.layers + self.take for i in self.taps):
            problems.append(f"taps: {self.taps} are not all among the layers computed")
        if self.resampling not in positions.INTERPOLATIONS:
            legal = sorted(positions.INTERPOLATIONS)
            problems.append(f"resampling: {self.resampling!r} is none of {legal}")
        if problems:
            raise ValueError("vision tower:\n  " + "\n  ".join(problems))

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image, pixels."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def tokens(self) -> int:
        """Length of the result."""
        return self.grid[0] * self.grid[1] + (self.class_token and self.keep_class)

    def segments(self) -> list[tuple[int, int, bool]]:
        """Runs of layers that are computed alike: (first, end, windowed).

        A run also ends where its output is tapped.
        """
        # `take` counts from the last layer; those behind it are not computed.
        end = self.layers + 1 + self.take
        cuts = {0, end, *(i + 1 for i in self.taps)}
        if self.window:
            # Each layer with full attention is a run of its own between windowed ones.
            cuts |= {j for i in self.full_layers for j in (i, i + 1) if j < end}
        return [
            (a, b, bool(self.window) and a not in self.full_layers)
            for a, b in itertools.pairwise(sorted(cuts))
        ]


class VisionResult(NamedTuple):
    """What a vision tower makes of images.

    Attributes:
        tokens: [b, n, d], row by row, a class token first.
        taps: outputs of the layers `VisionSpec.taps`, likewise.
    """

    tokens: Any
    taps: tuple[Any, ...]


class VisionTransformer(nn.Module):
    """Patches, positions, layers; no projection to the text's width."""

    spec: VisionSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b *f h x 3"], level: Float[Array, "b c"] | None = None
    ) -> VisionResult:
        """Normalized images -> tokens.

        Args:
            images: [b, h, x, 3], or the f frames of one token [b, f, h, x, 3] where the tower
                takes several.
            level: the condition of towers with `block.film`.

        Raises:
            ValueError: if the images are not of the tower's shape.
        """
        s, rope = self.spec, self._rotation()
        # Recomputed like the layers: it is little work, and as many tokens as a layer has.
        embed = remat(VisionTransformer._embed, self.remat, in_scan=False)
        x = embed(self, patches(images, s).astype(self.dtype))
        # One scan owns all parameters; runs of layers take theirs from it.
        everything = stack(s.layers, self.remat, "layers", self.dtype, **vars(s.block))
        segments = s.segments()
        # Runs of layers need parameters that exist, so the first pass runs all layers as one.
        if self.is_initializing():
            x = everything(x, None, rope, None, None, None, level)[0]
            return VisionResult(self._read(x), (x,) * len(s.taps))
        count, mask = x.shape[1], None
        if segments == [(0, s.layers, False)]:
            x, mask, rope = fused.padded(x, rope)
        apart, block = Stack.of(everything), Block(s.block, self.dtype, parent=None)
        taps, sink = [], apart.sink
        # Windows that the grid cuts off cannot be a batch; a mask does the same at full cost.
        are_whole = bool(s.window) and not (s.grid[0] % s.window or s.grid[1] % s.window)
        for first, end, windowed in segments:
            more: dict[str, Any] = {"mask": mask, "rope": rope, "level": level}
            if windowed and are_whole:
                x, more = self._in_windows(x, rope)
            elif windowed:
                more["mask"] = jnp.asarray(positions.window_mask(s.grid, s.window)[None])
            turn = apart.turn(functools.partial(block.apply, **more), self.remat)
            items, loops = apart.items(slice(first, end)), sharding.unroll(end - first)
            (x, sink), _ = jax.lax.scan(turn, (x, sink), items, unroll=loops)
            if windowed and are_whole:
                x = positions.from_windows(x, s.grid, s.window)
            if end - 1 in s.taps:
                # Tokens that were added for the kernels are cut off again.
                taps.append(x[:, :count])
        return VisionResult(self._read(x[:, :count]), tuple(taps))

    def _embed(self, x: Float[Array, "b n *c"]) -> Float[Array, "b m d"]:
        """Patches -> what the first layer gets."""
        s = self.spec
        x = Dense((s.width,), 1 + (s.frames > 1), s.patch_bias, self.dtype, name="patch")(
            sharding.rows(x)
        )
        x = sharding.rows(self._place(x))
        if s.pre_norm:
            x = NORMS[s.block.norm](s.block.eps, self.dtype, name="pre_norm")(x)
        return x

    def _place(self, x: Float[Array, "b n d"]) -> Array:
        """Add the class token and learned positions."""
        s = self.spec
        token = first = None
        if s.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (s.width,))
            token = token.astype(self.dtype)
        if s.table:
            # The class token's row comes first and is not part of the grid.
            with_class = s.class_token and s.class_position
            shape = (s.table[0] * s.table[1] + with_class, s.width)
            table = self.param("positions", _waves, shape, s.table).astype(self.dtype)
            if with_class:
                first, table = table[0], table[1:]
            x = x + positions.resample(table, s.table, s.grid, s.resampling)
        if token is not None:
            token = token if first is None else token + first
            token = jnp.broadcast_to(token, (x.shape[0], 1, s.width))
            before = [token]
            if s.registers:
                shape = (s.registers, s.width)
                registers = self.param("registers", nn.initializers.normal(0.02), shape)
                before.append(jnp.broadcast_to(registers.astype(self.dtype), (len(x), *shape)))
            x = jnp.concatenate([*before, x], axis=1)
        return x

    def _rotation(self) -> tuple[Array, Array] | None:
        """Cosines and sines of every token's angles, where the tower rotates."""
        s = self.spec
        if not s.rope_theta:
            return None
        head = s.block.head_width or s.width // s.block.heads
        angles = positions.rotation(s.grid, head, s.rope_theta)[None]
        return jnp.cos(angles), jnp.sin(angles)

    def _read(self, x: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        """The last layer's tokens -> those that are read."""
        s = self.spec
        if s.post_norm:
            # The norm belongs behind the last layer; it still needs parameters where an earlier one
            # is taken.
            normed = NORMS[s.block.norm](s.block.eps, self.dtype, name="post_norm")(x)
            x = normed if s.take == -1 else x
        behind = s.class_token + s.registers
        if s.class_token and s.keep_class:
            return jnp.concatenate([x[:, :1], x[:, behind:]], axis=1) if s.registers else x
        return x[:, behind:]

    def _in_windows(
        self, x: Float[Array, "b n d"], rope: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "_ k d"], dict[str, Any]]:
        """Windows as the batch: scores of n * side^2 numbers instead of n^2; and their rotation."""
        split = functools.partial(positions.to_windows, grid=self.spec.grid, side=self.spec.window)
        if rope is None:
            return split(x), {}
        return split(x), {"rope": tuple(jnp.tile(split(angle), (len(x), 1, 1)) for angle in rope)}


def patches(images: Float[Array, "b *f h x 3"], spec: VisionSpec) -> Float[Array, "b n *c"]:
    """Cut images into patches, row by row; channels of a patch: row, column, color.

    A reshape and a matrix product instead of a strided convolution: that is 1.4x torch's time on a
    CPU, the product 1.03x, and XLA's sharding handles it better.

    Raises:
        ValueError: if the images are not of the tower's shape.
    """
    (rows, columns), p = spec.grid, spec.patch
    several = spec.frames > 1 and images.shape[1:-3] == (spec.frames,)
    if images.shape[-3:-1] != spec.image or (images.ndim > 4 and not several):
        raise ValueError(
            f"images {list(images.shape)}: the vision tower takes images of {spec.image} pixels"
            + (f", one or {spec.frames} of them a token" if spec.frames > 1 else "")
        )
    if spec.frames > 1 and images.ndim == 4:
        # A still image counts as a video whose frames are all alike, as in Qwen2-VL.
        images = jnp.broadcast_to(images[:, None], (len(images), spec.frames, *images.shape[1:]))
    x = images.reshape(-1, rows, p, columns, p, 3).swapaxes(2, 3)
    if spec.frames == 1:
        return x.reshape(-1, rows * columns, p * p * 3)
    x = x.reshape(len(images), spec.frames, rows * columns, p * p * 3)
    # The patch embedding contracts frames and channels, so these two axes must be last.
    return x.swapaxes(1, 2)


def _waves(key: Array, shape: tuple[int, int], grid: positions.Grid) -> Float[Array, "n d"]:
    """Starting values of learned positions: sines and cosines of row and column, class token zero.

    Of unit size, like the patches: from the usual 0.02 a model trained from scratch takes hundreds
    of steps to find out where things are.
    """
    # Rounded up, so that widths that four does not divide are covered and cut below.
    quarter = -(-shape[1] // 4)
    frequency = 10.0 ** -jnp.linspace(0.0, 2.0, quarter)  # radians a patch
    waves = []
    for axis in positions.coordinates(grid):
        angle = axis[:, None] * frequency
        waves += [jnp.sin(angle), jnp.cos(angle)]
    table = jnp.concatenate(waves, axis=-1)[:, : shape[1]]
    return jnp.pad(table, ((shape[0] - len(table), 0), (0, 0)))
