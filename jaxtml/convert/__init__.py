"""Converts, verifies and inspects checkpoints of any size. Start at `conversion.py`."""
