"""Names of version 0.1 that scripts outside this repository import stay importable after their modules moved."""

from __future__ import annotations

from jaxtml.data import bank, scenarios, tasks
from jaxtml.train import optimizer, step


def test_scripts_of_version_0_1_find_the_parts_of_a_bank_and_the_schedule():
    assert scenarios is tasks.scenarios
    assert bank.Item("user", "train", "voice", "text") == bank.PlannedUtterance("user", "train", "voice", "text")
    assert step.schedule is optimizer.schedule
