"""`tiny`: trains, converses and is tested on two CPU cores; its trained weights ship with the package.

    jaxtml data tiny --out data && jaxtml train vocoder --workdir vocoder --data data
    jaxtml train tiny --workdir run --data data --vocoder vocoder

Six layers of width 192; 9.5M parameters, of which 1.6M are the vocoder.

Cost on two CPU cores: 40 minutes for the speech bank, 15 for the vocoder, 75 for 2,450 training steps.

What to expect on voices that training never heard: 71 % of a person's words and 60 % of synthetic voices' words are
heard right. Whisper finds 12 to 16 % word errors in the model's own voice. The shipped weights had 1.7 times the steps;
their figures are in docs/benchmarks.md. EXPERIMENTS.md is the log of experiments.
"""

from jaxtml.config import (
    AttentionConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DuplexConfig,
    FlowConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> Config:
    """Returns the config."""
    return Config(
        name="tiny",
        backbone=BackboneConfig(
            vocab_size=1024,
            d_model=192,
            n_layers=6,
            n_dense=2,
            global_layers=(2, 5),
            sliding=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=48, window=64, rel_extent=64),
            global_=AttentionConfig(
                n_heads=4, n_kv_heads=2, head_dim=48, window=256, rel_extent=256, pinned=8, retained=2048
            ),
            d_ff_dense=512,
            d_ff_expert=192,
            n_experts=8,
            experts_per_token=2,
            n_shared_experts=1,
            logits_divisor=1.0,
            route_scale=2.0,
            init_std=0.05,
        ),
        duplex=DuplexConfig(control_base=1008),
        flow=FlowConfig(width=256, depth=3, draws=2, history_noise=1.0, history_dropout=1.5),
        vision=VisionConfig(folds=((1, 5, 32), (1, 2, 64), (1, 4, 128), (2, 1, 0))),
        data=DataConfig(),
        train=TrainConfig(steps=2450, warmup=100, bias_rate=0.003, flow_weight=6.0),
    )
