"""The config of a model, its training and its serving: one frozen tree of typed dataclasses.

Every other folder reads its sizes and rates from here, and defines none itself. `tree` declares the dataclasses and
documents each field. `rules` says which values a field takes. `loading` finds named configs and applies `--set`.
`serialization` reads and writes the `config.json` of a checkpoint.

Field names are part of every checkpoint: renaming a field makes older `config.json` files unreadable.
"""

from jaxtml.config.loading import CONFIG_DIR, load, names, override
from jaxtml.config.serialization import from_json, to_json
from jaxtml.config.tree import (
    AttentionConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DuplexConfig,
    FlowConfig,
    ServeConfig,
    TrainConfig,
    VisionConfig,
    VocoderConfig,
    validate,
)

__all__ = [
    "CONFIG_DIR",
    "AttentionConfig",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "DuplexConfig",
    "FlowConfig",
    "ServeConfig",
    "TrainConfig",
    "VisionConfig",
    "VocoderConfig",
    "from_json",
    "load",
    "names",
    "override",
    "to_json",
    "validate",
]
