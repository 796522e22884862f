"""The floating-point operations that a token needs, whatever the implementation: the measure of utilisation.

`6 N` per trained token for the N parameters that work on it (Kaplan et al., 2020), and the two matmuls of attention
over the keys that a query can see. Recomputation, padding and masked keys are overhead, not need. Called by the trainer
and by `plan`.
"""

from __future__ import annotations

from jaxtml.config import AttentionConfig, BackboneConfig, Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count_parameters

_BESIDE = ("vocoder", "visual")  # work on frames and patches, not on tokens


def visible_keys(attention: AttentionConfig, tokens: int) -> float:
    """Keys that a query sees, mean over a sequence of `tokens`."""
    reach = min(attention.window, tokens)
    return reach - reach * (reach - 1) / (2 * tokens)


def forward_flops_per_token(config: Config, tokens: int) -> float:
    """Of one token in a sequence of `tokens`, forward: 2 per active parameter and 4 per head width and visible key."""
    b = config.backbone
    table = {name: part for name, part in InteractionModel(config).serving_specs().items() if name not in _BESIDE}
    _, active = count_parameters(table)
    return 2 * active + _attention(b, b.n_layers, b.global_layers, tokens)


def train_flops_per_token(config: Config) -> float:
    """Of one token of training, forward and backward: three times the forward pass, the prediction heads' included."""
    forward, b, mtp = forward_flops_per_token(config, config.data.tokens), config.backbone, InteractionModel(config).mtp
    if mtp is not None:
        heads, _ = count_parameters(mtp.specs())
        forward += 2 * (heads + b.mtp_heads * b.d_model * b.vocab_size)
        forward += _attention(b, b.mtp_heads, b.mtp_global, config.data.tokens)
    return 3 * forward


def _attention(backbone: BackboneConfig, layers: int, global_layers: tuple[int, ...], tokens: int) -> float:
    total = 0.0
    for layer in range(layers):
        kind = backbone.global_ if layer in global_layers else backbone.sliding
        total += 4 * kind.n_heads * kind.head_dim * visible_keys(kind, tokens)
    return total
