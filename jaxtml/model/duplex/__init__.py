"""One micro-turn (200 ms of input and output) of a batch of sessions, as one compiled program.

Each session of the batch occupies a slot.

- `programs.Duplex`: the entry for callers; prepares parameters, compiles, knows the layout on a mesh.
- `step.micro_turn`: the computation, from top to bottom.
- `grammar`: which token may follow, and `grammar.decide_gate`: whether the model speaks.
- `state`: what a session remembers, what a micro-turn takes and gives.
- `cpu_batches`: how a CPU skips slots that have nothing to do.
"""
