"""The flow head: one hidden state gives the next 50 ms of speech, by conditional flow matching.

Axes: N positions, D model width, X = 400 log-mels (80 coarse, 4 x 80 fine), W head width, J noise draws. Called by
`interaction`, by the training step (`loss`) and by `duplex.step` (`sample`).

The head is an AdaLN MLP, as in MAR's diffusion loss head (Li et al., 2024) and in CALM (2025). It predicts the clean
frame x1 from x_t = (1 - t) x0 + t x1; the velocity is (x1 - x_t) / (1 - t) (Lipman et al., 2023). Speech does not fill
all 400 dimensions, but noise does. A network that predicts the velocity must reproduce the noise, because the velocity
contains it. A network that predicts x1 need not, so it can be narrow. The last Euler step then lands on the prediction
itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import FlowConfig
from jaxtml.model.layers import rms_normalise
from jaxtml.model.spec import normal, param, zeros
from jaxtml.stream.layout import SPEECH_DIM

CENTRE, SCALE = -2.5, 2.0  # normalisation: log-mels in [-7, 2] become [-2.25, 2.25]
TIME_FEATURES = 32  # sines and cosines of the flow time


class FlowHead(nnx.Module):
    """Predicts normalised speech frames from a noisy frame, the flow time and a hidden state."""

    def __init__(self, config: FlowConfig, dim: int):
        w = config.width
        self.config = config
        self.w_in = param((SPEECH_DIM, w), ("speech", "flow"), normal(SPEECH_DIM**-0.5))
        self.w_cond = param((dim, w), ("embed", "flow_condition"), normal(dim**-0.5))
        self.w_before = param((SPEECH_DIM, w), ("speech", "flow"), normal(SPEECH_DIM**-0.5))
        self.w_time = param((TIME_FEATURES, w), ("time", "flow"), normal(TIME_FEATURES**-0.5))
        for i in range(config.depth):
            setattr(self, f"mod_{i}", param((w, 3 * w), ("flow", "flow_mod"), zeros))
            setattr(self, f"up_{i}", param((w, 2 * w), ("flow", "flow_mlp"), normal(w**-0.5)))
            setattr(self, f"down_{i}", param((2 * w, w), ("flow_mlp", "flow"), normal((2 * w) ** -0.5)))
        self.mod_out = param((w, 2 * w), ("flow", "flow_mod"), zeros)
        self.w_out = param((w, SPEECH_DIM), ("flow", "speech"), zeros)

    def condition(self, hidden: jax.Array, before: jax.Array) -> jax.Array:
        """Returns the part of the conditioning that does not depend on the flow time, `[N, W]`.

        Args:
          hidden: `[N, D]`.
          before: `[N, X]`, the normalised frame before; zeros where there is none.
        """
        dtype = hidden.dtype
        return hidden @ self.w_cond[...].astype(dtype) + before.astype(dtype) @ self.w_before[...].astype(dtype)

    def modulation(self, t: jax.Array, condition: jax.Array) -> list[jax.Array]:
        """Returns the modulation (shift, scale, gate) of each layer and of the output; it does not depend on the frame.

        Args:
          t: `[N]`, the flow time in [0, 1).
          condition: `[N, W]`, from `condition`.

        Returns:
          `[N, 3 W]` for each layer, and last `[N, 2 W]` (shift, scale) for the output.
        """
        dtype = condition.dtype
        frequency = jnp.exp(jnp.linspace(0.0, 5.0, TIME_FEATURES // 2, dtype=jnp.float32))
        angle = t.astype(jnp.float32)[:, None] * frequency
        time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(dtype)
        c = jax.nn.silu(condition + time @ self.w_time[...].astype(dtype))
        weights = [*(getattr(self, f"mod_{i}") for i in range(self.config.depth)), self.mod_out]
        return [c @ weight[...].astype(dtype) for weight in weights]

    def __call__(self, x: jax.Array, condition: jax.Array, modulation: list[jax.Array]) -> jax.Array:
        """Predicts x1, `[N, X]`, from `x` `[N, X]`, `condition` `[N, W]` and the `modulation` of the flow time."""
        dtype = x.dtype
        *layers, last = modulation
        h = x @ self.w_in[...].astype(dtype) + condition
        for i, layer in enumerate(layers):
            shift, scale, gate = jnp.split(layer, 3, axis=-1)
            y = rms_normalise(h, 1e-6) * (1 + scale) + shift
            y = jax.nn.silu(y @ getattr(self, f"up_{i}")[...].astype(dtype))
            h = h + (1 + gate) * (y @ getattr(self, f"down_{i}")[...].astype(dtype))
        shift, scale = jnp.split(last, 2, axis=-1)
        return (rms_normalise(h, 1e-6) * (1 + scale) + shift) @ self.w_out[...].astype(dtype)

    def loss(
        self, hidden: jax.Array, before: jax.Array, target: jax.Array, valid: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """Returns the squared error of x1: the mean over log-mels and noise draws, summed over the valid positions.

        All flow times have the same weight. The squared error of the velocity would be this error times `(1 - t)^-2`,
        and would have the same minimum. But that factor lets flow times near 1 dominate the loss. At these times the
        noise is nearly gone, and a head can predict x1 without knowing what is being said.

        Args:
          hidden: `[N, D]`.
          before: `[N, X]`, see `condition`.
          target: `[N, X]`, log-mels.
          valid: `[N]` bool.
          keys: `[N]` random keys, one for the noise of each position.
        """
        draws = self.config.draws
        condition = jnp.repeat(self.condition(hidden, before), draws, axis=0)
        x1 = jnp.repeat(normalise(target).astype(hidden.dtype), draws, axis=0)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise_key, time_key = jax.random.split(key)
            return jax.random.normal(noise_key, (draws, SPEECH_DIM), x1.dtype), jax.random.uniform(time_key, (draws,))

        x0, t = (a.reshape(len(x1), *a.shape[2:]) for a in jax.vmap(draw)(keys))
        mixed = (1 - t[:, None]) * x0 + t[:, None] * x1
        modulation = self.modulation(t, condition)
        error = (self(mixed.astype(x1.dtype), condition, modulation) - x1).astype(jnp.float32)
        mask = jnp.repeat(valid.astype(jnp.float32), draws)
        return (mask * jnp.mean(error * error, axis=-1)).sum() / draws

    def sample(self, hidden: jax.Array, before: jax.Array, noise: jax.Array, steps: int) -> jax.Array:
        """Draws S consecutive frames of each session at once, in `steps` Euler steps.

        A frame's condition is the frame before it. While the frames are drawn together, this is the present estimate of
        that frame, from the Euler step before. In the first step there is none, as for a frame that training left out.

        Args:
          hidden: `[B, S, D]`, the hidden state of each frame.
          before: `[B, X]`, the normalised frame before the first one.
          noise: `[B, S, X]`, already scaled by the temperature.
          steps: Euler steps.

        Returns:
          `[B, S, X]`, log-mels.
        """
        batch, frames, _ = hidden.shape
        flat = hidden.reshape(batch * frames, -1)
        x = noise.astype(hidden.dtype).reshape(batch * frames, -1)
        estimate = jnp.zeros_like(x)
        for i in range(steps):
            t = i / steps
            earlier = estimate.reshape(noise.shape)[:, :-1]
            neighbour = jnp.concatenate([before[:, None].astype(x.dtype), earlier], axis=1).reshape(x.shape)
            condition = self.condition(flat, neighbour)
            estimate = self(x, condition, self.modulation(jnp.full((len(x),), t), condition))
            x = estimate if i == steps - 1 else x + (estimate - x) * (1 / steps) / (1 - t)
        return denormalise(x).reshape(noise.shape)


def normalise(log_mel: jax.Array) -> jax.Array:
    """Normalises log-mels for the network."""
    return (log_mel - CENTRE) / SCALE


def denormalise(x: jax.Array) -> jax.Array:
    """Undoes `normalise` and clips to the range of log-mels."""
    return jnp.clip(x * SCALE + CENTRE, -7.0, 2.0)
