"""`jaxtml train` refuses to start without its data."""

from __future__ import annotations


def test_train_refuses_data_without_a_tokenizer_and_makes_nothing(refusal, tmp_path):
    assert "no tokenizer" in refusal("train", "tiny", "--workdir", tmp_path / "w", "--data", tmp_path)
    assert not (tmp_path / "w").exists()
