"""The floating-point operations that a token needs, whatever the implementation; utilisation (MFU) counts only these.

A trained token needs `6 N` FLOPs for the N parameters that work on it (Kaplan et al., 2020), and the two matmuls of
attention over the keys that a query can see. Recomputation, padding and masked keys are overhead and do not count.
Called by the trainer's progress line and by `jaxtml plan`.
"""

from __future__ import annotations

from jaxtml.config import AttentionConfig, BackboneConfig, Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count_parameters

_NOT_PER_TOKEN = ("vocoder", "visual")  # these parameters work on frames and patches, not on tokens


def visible_keys(attention: AttentionConfig, tokens: int) -> float:
    """Returns the number of keys that a query sees, averaged over a sequence of `tokens` tokens.

    With retained tokens, it is the number of a sequence in which every token is retained: an upper bound.
    """
    reach = min(attention.window + attention.retained, tokens)
    return reach - reach * (reach - 1) / (2 * tokens)


def forward_flops_per_token(config: Config, tokens: int) -> float:
    """Returns the FLOPs of the forward pass for one token in a sequence of `tokens` tokens.

    A token needs 2 FLOPs per active parameter. Attention needs 4 per visible key, head and element of a head.
    """
    b = config.backbone
    table = InteractionModel(config).serving_specs()
    table = {name: part for name, part in table.items() if name not in _NOT_PER_TOKEN}
    _, active = count_parameters(table)
    return 2 * active + _attention_flops(b, b.n_layers, b.global_layers, tokens)


def train_flops_per_token(config: Config) -> float:
    """Returns the FLOPs of one trained token, forward and backward.

    This is three times the forward pass, which in training includes the multi-token prediction heads.
    """
    forward, b, mtp = forward_flops_per_token(config, config.data.tokens), config.backbone, InteractionModel(config).mtp
    if mtp is not None:
        heads, _ = count_parameters(mtp.specs())
        forward += 2 * (heads + b.mtp_heads * b.d_model * b.vocab_size)
        forward += _attention_flops(b, b.mtp_heads, b.mtp_global, config.data.tokens)
    return 3 * forward


def _attention_flops(backbone: BackboneConfig, layers: int, global_layers: tuple[int, ...], tokens: int) -> float:
    total = 0.0
    for layer in range(layers):
        kind = backbone.global_ if layer in global_layers else backbone.sliding
        total += 4 * kind.n_heads * kind.head_dim * visible_keys(kind, tokens)
    return total
