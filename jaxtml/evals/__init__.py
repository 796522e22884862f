"""Evaluation: the model takes part in sessions with known right answers, and its output is scored.

1. `material` makes the users' side of the sessions. `run` runs the model on it. A run that was killed can resume.
2. `observation` turns a session into a `record`: times and words, as JSON.
3. `outcomes` decides for each user turn of a record what the model got right. `metrics` and `scores` count outcomes.
   `judge` transcribes the model's voice with an independent speech recogniser.
4. `report` prints tables and draws the summary.

Some words are used in all these files. A micro-turn is 200 ms, the unit in which the model works. In each micro-turn
the model's gate is open (it speaks) or closed (it listens). A stretch is a run of micro-turns with an open gate. The
bank is the folder of synthesised speech (`jaxtml.data.bank`).
"""
