"""`inkling_small`: the geometry of the open checkpoint Inkling-Small (Apache-2.0), which loads into it.

    jaxtml info inkling_small --json

42 layers of width 4096. Each layer with experts has 256 routed and 2 shared ones; 6 + 2 of them work on a token.

Size: 263.7B parameters without the checkpoint's multi-token-prediction heads, 11.2B of them active. With the heads
(`--set backbone.mtp_heads=8 --set backbone.mtp_global=[1,3]`) 266.0B.

Cost: 532 GB in bfloat16. No single machine runs it; `jaxtml plan inkling_small --topology ...` says which pods can.

What to expect: it hears and sees like the released model. It cannot speak, so the parts that speech needs are as small
as they can be. `tml_interaction_small` has the same layers and speaks.
"""

from jaxtml.config import (
    AttentionConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DuplexConfig,
    FlowConfig,
    ServeConfig,
    TrainConfig,
)

LAYERS = 42
LONGEST = 1_048_576  # tokens: the longest session of the released model


def get_config() -> Config:
    """Returns the config."""
    return Config(
        name="inkling_small",
        backbone=BackboneConfig(
            vocab_size=201_024,
            unpadded_vocab_size=200_058,
            d_model=4096,
            n_layers=LAYERS,
            n_dense=2,
            global_layers=tuple(range(5, LAYERS, 6)),  # every sixth
            sliding=AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=512, rel_extent=512),
            global_=AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=LONGEST, rel_extent=1024),
            d_ff_dense=16_384,
            d_ff_expert=2048,
            n_experts=256,
            experts_per_token=6,
            n_shared_experts=2,
            logits_divisor=16.0,
            log_scaling_floor=128_000,
            log_scaling_alpha=0.1,
        ),
        duplex=DuplexConfig(control_base=200_058),
        flow=FlowConfig(width=64, depth=1),
        data=DataConfig(tokens=4096),
        train=TrainConfig(batch=512, learning_rate=2e-4, compute_dtype="bfloat16", remat="full"),
        serve=ServeConfig(compute_dtype="bfloat16"),
    )
