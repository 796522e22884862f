"""Sessions with a loaded model: over waveforms, over recordings, and live.

A session runs in micro-turns. In each micro-turn the model takes 200 ms of input and gives 200 ms of output. Its gate
decides for each micro-turn whether the model speaks (the gate is open) or listens (the gate is closed).

- `library`: `load`, `Model` and `Session`, which `jaxtml` exports.
- `engine.Engine`: parameters and compiled steps. `records`: what sessions take and give.
- `batch.SessionBatch` and `converse`: sessions that begin together. `slots.Slots`: sessions of a server.
- `recording`, `summary`, `picture`, `timeline`: what `jaxtml converse` reads, writes and prints.
"""
