"""`tml_interaction_small`: the model that this stack exists for, 276B parameters, 12B active.

    jaxtml info tml_interaction_small --json

44 layers of Inkling-Small's geometry and everything that a micro-turn needs: clock, own voice, flow head, vocoder. A
session keeps 512 tokens on sliding layers; on global ones the last 32,768, about twelve minutes of talk, and its first
64 for good. Up to 153 patches a micro-turn are a 640 x 360 frame.
"""

import dataclasses

from configs.inkling_small import backbone
from jaxtml.config import Config, DataConfig, DuplexConfig, FlowConfig, ServeConfig, TrainConfig


def get_config() -> Config:
    released = backbone(44)
    remembered = dataclasses.replace(released.global_, window=32_768, pinned=64)
    return Config(
        name="tml_interaction_small",
        backbone=dataclasses.replace(released, global_=remembered),
        duplex=DuplexConfig(control_base=200_058, max_typed=32, max_patches=153, max_heard=8, max_text=12),
        flow=FlowConfig(width=2048, depth=4),
        data=DataConfig(turns=500, tokens=4096),
        train=TrainConfig(batch=512, learning_rate=2e-4, compute_dtype="bfloat16", remat="full"),
        serve=ServeConfig(sessions=32, compute_dtype="bfloat16"),
    )
