"""`tml_interaction_small`: the model that this stack exists for, 276B parameters, 12B active.

    jaxtml info tml_interaction_small --json
    jaxtml plan tml_interaction_small --topology v5p:4x4x8 --mesh data=16,expert=8 --set train.batch=128

44 layers of Inkling-Small's geometry, and all parts that a full-duplex model needs beside them: inputs for the time and
for the model's own speech, a flow head, a drafter, and a vocoder. A session keeps 512 tokens on sliding layers. On
global layers it keeps its first 64 tokens for good, the last 8,192 (three and a half minutes of talk), and 24,576
tokens of the text before them: an hour and a half of dense talk, and hours of a talk with pauses. A micro-turn has room
for 153 patches. These are a frame of 640 x 360: 9 rows of 16 patches, each with one more patch that marks its end. It
writes at most 3 heard and 4 own tokens of text, 15 and 20 a second: more than people say.

Cost, as the compilers predict it: on 128 v5p chips, with `train.capacity=1.1` and `train.transport=ragged`, a training
step of 128 rows takes 49.9 GB of each chip, and 943 ms at best. On 32 v6e chips, a micro-turn of 32 sessions takes 13
ms at best if all listen, 39 ms if all write and speak, and 151 ms if everything comes together.

What to expect: no run on a real pod has been made yet. `jaxtml convert RELEASE DST --as tml_interaction_small` begins
with Inkling-Small's weights.
"""

import dataclasses

from jaxtml.config import Config, DataConfig, DuplexConfig, FlowConfig, ServeConfig, TrainConfig, load

LAYERS = 44


def get_config() -> Config:
    """Returns the config."""
    released = load("inkling_small").backbone
    return Config(
        name="tml_interaction_small",
        backbone=dataclasses.replace(
            released,
            n_layers=LAYERS,
            global_layers=tuple(range(5, LAYERS, 6)),  # every sixth, as released
            global_=dataclasses.replace(released.global_, window=8192, pinned=64, retained=24_576),
        ),
        duplex=DuplexConfig(control_base=200_058, max_typed=32, max_patches=153, max_heard=3, max_text=4),
        flow=FlowConfig(width=2048, depth=4),
        data=DataConfig(turns=500, tokens=4096),
        train=TrainConfig(batch=512, learning_rate=2e-4, compute_dtype="bfloat16", remat="full"),
        serve=ServeConfig(sessions=32, compute_dtype="bfloat16"),
    )
