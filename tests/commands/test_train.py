"""`jaxtml train` and `jaxtml data` refuse to start without their data."""

from __future__ import annotations


def test_train_refuses_data_without_a_tokenizer_and_makes_nothing(refusal, tmp_path):
    assert "no tokenizer" in refusal("train", "tiny", "--workdir", tmp_path / "w", "--data", tmp_path)
    assert not (tmp_path / "w").exists()


def test_data_without_building_refuses_a_missing_bank(refusal, tmp_path):
    assert "bank" in refusal("data", "tiny", "--out", tmp_path / "d", "--no-build", "--show", 1)
