"""Diffusion over the chunk.

Sources: training predicts the noise (DDPM, Ho et al. 2020) at levels of the cosine schedule (Nichol
and Dhariwal 2021); sampling is deterministic (DDIM, Song et al. 2021) over a few of them; clean
estimates are clipped to the actions' range, as in Diffusion Policy (Chi et al. 2023).

Legend: b batch · w window · u steps to predict · m latents · d features · f chunk
a action dimension
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import StructureConfig
from vla_jax.config.option import option
from vla_jax.models.heads.common import Head, width_refusals
from vla_jax.models.heads.denoiser import Denoiser, DenoiserOptions, as_values
from vla_jax.models.heads.guidance import guided_clean
from vla_jax.types import Actions, Guide, Prediction


def signal_levels(levels: int) -> Float[np.ndarray, "levels"]:
    """Share of the signal's variance left after each level (alpha bar), falling; float64."""
    # The offset 0.008 keeps the noise of the first levels from being vanishingly small.
    grid = (np.arange(levels + 1) / levels + 0.008) / 1.008
    squared = np.cos(grid * np.pi / 2) ** 2
    # Without the cap of 0.999 the last level would hold no signal, and sampling divides by its
    # root.
    return np.cumprod(1 - np.minimum(1 - squared[1:] / squared[:-1], 0.999))


@dataclass(frozen=True)
class DiffusionOptions(DenoiserOptions):
    """Options of the head `diffusion`."""

    noise_levels: int = option(100, "Noise levels of training.", positive=True)


class DiffusionHead(Head):
    """Predicts the noise in a chunk; actions are samples."""

    head: DiffusionOptions

    OPTIONS = DiffusionOptions
    guidable = True

    @classmethod
    def refusals(cls, head: DiffusionOptions, structure: StructureConfig) -> list[str]:
        """Attention splits the width evenly among its heads."""
        return super().refusals(head, structure) + width_refusals(head, structure)

    def setup(self):
        self.net = Denoiser(self.head, self.sizes, self.dtype)

    def loss(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        actions: Actions,
        key: PRNGKeyArray,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error of the noise at one random level a step; the gripper as the arm."""
        del gripper_weight
        clean = as_values(actions, self.sizes.gripper)
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        level = jax.random.randint(level_key, clean.shape[:2], 0, self.head.noise_levels)
        signal = self._signal[level][..., None, None]
        noisy = jnp.sqrt(signal) * clean + jnp.sqrt(1 - signal) * noise
        time = self._time(level)
        total, rows = self.net.loss(features, valid, noisy, time, noise, actions.mask)
        return total, {"rows": rows, "loss_noise": total}

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """One sample a step; see `Denoiser.sample`."""
        count = self.head.sampling_steps
        # From the highest level down, evenly; after the last one nothing but signal is left.
        chosen = np.linspace(self.head.noise_levels - 1, 0, count).round().astype(np.int32)
        levels = jnp.asarray(chosen)
        after = jnp.append(self._signal[levels[1:]], 1.0)

        def denoise(i: Array, x: Float[Array, "r f a"], estimate: Any) -> Float[Array, "r f a"]:
            signal = self._signal[levels[i]]

            def clean_estimate(y: Array) -> Array:
                noise = estimate(y, self._time(levels[i]))
                return (y - jnp.sqrt(1 - signal) * noise) / jnp.sqrt(signal)

            clean = guided_clean(clean_estimate, x, guide)
            # The noise is then taken again from the clipped estimate, so that both still add up to
            # `x`.
            clean = jnp.clip(clean, -1.0, 1.0)
            noise = (x - jnp.sqrt(signal) * clean) / jnp.sqrt(1 - signal)
            return jnp.sqrt(after[i]) * clean + jnp.sqrt(1 - after[i]) * noise

        return self.net.sample(features, valid, key, last, denoise)

    @property
    def _signal(self) -> Float[Array, "levels"]:
        return jnp.asarray(signal_levels(self.head.noise_levels), jnp.float32)

    def _time(self, level: Array) -> Array:
        return level.astype(jnp.float32) / self.head.noise_levels
