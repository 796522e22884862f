"""The interaction model. Importing it puts Flax NNX in tree mode, which everything below relies on."""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
