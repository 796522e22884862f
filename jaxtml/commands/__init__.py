"""The command line: one module for each command. Start at `main.py`."""
