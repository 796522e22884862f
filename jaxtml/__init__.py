"""jaxtml: train, convert, evaluate and serve full-duplex interaction models in JAX."""

__version__ = "0.2.0"
