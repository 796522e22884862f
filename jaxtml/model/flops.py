"""The floating-point operations that a token needs, whatever the implementation: the measure of utilisation.

`6 N` per trained token for the N parameters that work on it (Kaplan et al., 2020), and the two matmuls of attention
over the keys that a query can see. Recomputation, padding and masked keys are overhead, not need. Called by the trainer
and by `plan`.
"""

from __future__ import annotations

from jaxtml.config import AttentionConfig, Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count


def visible_keys(attention: AttentionConfig, tokens: int) -> float:
    """Keys that a query sees, mean over a sequence of `tokens`."""
    reach = min(attention.window, tokens)
    return reach - reach * (reach - 1) / (2 * tokens)


def forward_flops_per_token(config: Config, tokens: int) -> float:
    """Of one token in a sequence of `tokens`, forward: 2 per active parameter and 4 per head width and visible key."""
    b = config.backbone
    table = {name: part for name, part in InteractionModel(config).specs().items() if name not in ("vocoder", "visual")}
    _, active = count(table)
    attention = 0.0
    for layer in range(b.n_layers):
        kind = b.global_ if layer in b.global_layers else b.sliding
        attention += 4 * kind.n_heads * kind.head_dim * visible_keys(kind, tokens)
    return 2 * active + attention


def train_flops_per_token(config: Config) -> float:
    """Of one token of training, forward and backward: three times the forward pass."""
    return 3 * forward_flops_per_token(config, config.data.tokens)
