"""Sessions with a loaded model: over waveforms, over recordings, and live.

- `library`: `load`, `Model` and `Session`, which `jaxtml` exports.
- `engine.Engine`: parameters and compiled steps. `records`: what sessions take and give.
- `batch.SessionBatch` and `converse`: sessions that begin together. `slots.Slots`: sessions of a server.
- `recording`, `summary`, `picture`, `timeline`: what `jaxtml converse` reads, writes and prints.
"""
