"""The drafter: guesses the next text tokens of a micro-turn, so that one forward call can verify several at once.

Axes: N positions, D model width, V vocabulary, K drafted tokens. Called by `interaction`, by the training step (`loss`)
and by `duplex.step`.

The drafter is a small recurrent network (ReDrafter, Cheng et al., 2024). It starts from the hidden state that chose a
token. Each step reads one more token and gives the state from which the next one is guessed, with the model's own
unembedding. It has neither attention nor a cache. A wrong guess costs time, never a token: `duplex.step` keeps a guess
only if the model chooses the same token.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.layers import RMSNorm, project
from jaxtml.model.spec import normal, param, zeros


class Drafter(nnx.Module):
    """One step: norms both inputs, projects them together, and runs one feed-forward layer with a residual."""

    def __init__(self, config: BackboneConfig):
        d = config.d_model
        self.state_norm = RMSNorm(d, config.norm_eps, "embed")
        self.token_norm = RMSNorm(d, config.norm_eps, "embed")
        self.mlp_norm = RMSNorm(d, config.norm_eps, "embed")
        self.input_proj = param((2, d, d), ("pair", "embed", "merged"), normal(d**-0.5))
        self.up = param((d, 2 * d), ("embed", "draft"), normal(d**-0.5))
        self.down = param((2 * d, d), ("draft", "embed"), zeros)

    def __call__(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """Returns the next state `[N, D]`.

        Args:
          state: `[N, D]`, the backbone's normed hidden state that chose the token, or the drafter's state before.
          token: `[N, D]`, the embedding of the token.
        """
        dtype = state.dtype
        weights = self.input_proj[...].astype(dtype)
        x = state + project(self.state_norm(state), weights[0]) + project(self.token_norm(token), weights[1])
        y = jax.nn.silu(project(self.mlp_norm(x), self.up[...].astype(dtype)))
        return x + project(y, self.down[...].astype(dtype))
