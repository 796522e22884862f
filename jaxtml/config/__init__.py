"""The config of a model, its training and its serving: one frozen tree of typed dataclasses.

Every other folder reads its sizes and rates from here, and defines none itself. `tree` declares the dataclasses and
documents each field. `rules` says which values a field takes. `loading` finds named configs and applies `--set`.
`serialization` reads and writes the `config.json` of a checkpoint.

Field names are part of every checkpoint: renaming a field makes older `config.json` files unreadable.
"""

from jaxtml.config.loading import CONFIG_DIR as CONFIG_DIR
from jaxtml.config.loading import load as load
from jaxtml.config.loading import names as names
from jaxtml.config.loading import override as override
from jaxtml.config.serialization import from_json as from_json
from jaxtml.config.serialization import to_json as to_json
from jaxtml.config.tree import AttentionConfig as AttentionConfig
from jaxtml.config.tree import BackboneConfig as BackboneConfig
from jaxtml.config.tree import Config as Config
from jaxtml.config.tree import DataConfig as DataConfig
from jaxtml.config.tree import DuplexConfig as DuplexConfig
from jaxtml.config.tree import FlowConfig as FlowConfig
from jaxtml.config.tree import ServeConfig as ServeConfig
from jaxtml.config.tree import TrainConfig as TrainConfig
from jaxtml.config.tree import VisionConfig as VisionConfig
from jaxtml.config.tree import VocoderConfig as VocoderConfig
from jaxtml.config.tree import validate as validate
