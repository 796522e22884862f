"""Evaluation: sessions with known answers are held, observed and scored.

1. `material` makes the sessions. `run` holds them with the model, resumably.
2. `observation` turns a session into a `record`: times and words, as JSON.
3. `outcomes` judges each user turn of a record. `metrics` and `scores` count outcomes; `judge` transcribes the model's
   voice with an independent speech recogniser.
4. `report` prints tables and draws the summary.
"""
