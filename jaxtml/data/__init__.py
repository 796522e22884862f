"""Training data: from voices and texts to batches.

The steps, in order:

1. `voices` synthesises texts. `bank_plan` decides who says which text, and `bank` keeps the utterances on disk.
2. `talks` mixes utterances into two-channel conversations. `tasks` defines what users say and the right replies. A
   scenario is a rule for when each side is heard, for example an interruption.
3. `conversations` encodes the conversations as the rows of a `dataset`. `cache` can keep encoded rows on disk.
4. `pipeline` makes batches of rows.

`examples` writes conversations for people to check.

To add a scenario, read `talks/mix.py`; to add a dataset, `dataset.py`; to add a voice, `bank_plan.py`.
"""

from jaxtml.data.tasks import scenarios as scenarios  # its place in version 0.1: scripts import it from here
