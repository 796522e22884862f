"""Reads and writes checkpoints: parameter sources, parameter sinks, and the formats of both. Start at `source.py`."""
