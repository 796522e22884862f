"""The interaction model. Importing this package puts Flax NNX into tree mode, on which all modules below rely."""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
