"""Training data: from voices and texts to batches.

`voices` speak texts -> `bank_plan` and `bank` keep the utterances on disk -> `talks` mix utterances into two-channel
conversations about what `tasks` say -> `conversations` encodes them as the rows of a `dataset`, which `cache` can keep
on disk -> `pipeline` makes batches of rows. `examples` writes conversations for people to check.

To add a scenario, read `talks/mix.py`; to add a dataset, `dataset.py`; to add a voice, `bank_plan.py`.
"""
