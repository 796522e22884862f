"""`inkling_small`: the geometry of the open checkpoint Inkling-Small (Apache-2.0), which loads into it.

    jaxtml info inkling_small --json

42 layers of width 4096, 256 routed and 2 shared experts of which 6 + 2 work on a token: 263.7B parameters without the
checkpoint's multi-token-prediction layers, 11.2B of them active; with them (`--set backbone.mtp_heads=8 --set
backbone.mtp_global=[1,3]`) 266.0B. It hears and sees as released; it cannot speak, so the parts that speech needs are
as small as they can be. 532 GB in bfloat16: no single machine runs it.
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

LONGEST = 1_048_576  # tokens; the released model's


def backbone(n_layers: int) -> BackboneConfig:
    """Inkling-Small's decoder with `n_layers` layers: every sixth is global, the first two are dense."""
    return BackboneConfig(
        vocab_size=201_024,
        unpadded_vocab_size=200_058,
        d_model=4096,
        n_layers=n_layers,
        n_dense=2,
        global_layers=tuple(range(5, n_layers, 6)),
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
    )


def get_config() -> Config:
    return Config(
        name="inkling_small",
        backbone=backbone(42),
        duplex=DuplexConfig(control_base=200_058),
        flow=FlowConfig(width=64, depth=1),
        data=DataConfig(tokens=4096),
        train=TrainConfig(batch=512, learning_rate=2e-4, compute_dtype="bfloat16", remat="full"),
        serve=ServeConfig(compute_dtype="bfloat16"),
    )
