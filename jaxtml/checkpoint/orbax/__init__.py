"""The format of jaxtml checkpoints: Orbax trees of Zarr arrays, read and written in part through TensorStore."""
