"""`jaxtml train` refuses to start without its data."""

from __future__ import annotations

import errno

import pytest

from jaxtml.commands import train


def test_train_refuses_data_without_a_tokenizer_and_makes_nothing(refusal, tmp_path):
    assert "no tokenizer" in refusal("train", "tiny", "--workdir", tmp_path / "w", "--data", tmp_path)
    assert not (tmp_path / "w").exists()


def test_train_without_data_says_how_to_make_them(refusal, tmp_path):
    line = refusal("train", "tiny", "--workdir", tmp_path / "w")
    assert "run `jaxtml data tiny --out data` first, then give --data data" in line
    line = refusal("train", "vocoder", "--workdir", tmp_path / "w", "--data", tmp_path / "d")
    assert f"run `jaxtml data tiny --out {tmp_path / 'd'}` first" in line
    (tmp_path / "file").touch()
    assert "is a file: name the folder" in refusal("train", "tiny", "--workdir", "w", "--data", tmp_path / "file")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "option", [("--mesh", "data=2"), ("--vocoder", "v"), ("--workers", 2), ("--profile", 1), ("--change-run",)]
)
def test_the_vocoder_refuses_options_that_it_does_not_read(refusal, tmp_path, option):
    line = refusal("train", "vocoder", "--workdir", tmp_path / "w", *option)
    assert f"has no {option[0]}: leave it out" in line


def test_a_model_refuses_options_of_the_vocoder_and_the_vocoder_refuses_several_processes(
    refusal, tmp_path, monkeypatch
):
    assert "--base tiny is an option of" in refusal("train", "tiny", "--workdir", tmp_path / "w", "--base", "tiny")
    for name, value in {"JAX_COORDINATOR_ADDRESS": "h:1", "NNODES": "2", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "runs in one process" in refusal("train", "vocoder", "--workdir", tmp_path / "w")


@pytest.mark.parametrize("option", ["--workdir", "--data", "--start-from", "--vocoder"])
def test_an_empty_name_is_refused(refusal, tmp_path, option):
    line = refusal("train", "tiny", "--workdir", tmp_path / "w", option, "")
    assert f"argument {option}: the name is empty" in line


def test_a_file_in_place_of_the_folder_is_refused_before_the_data_is_looked_for(refusal, tmp_path):
    (tmp_path / "file").touch()
    for config in ("tiny", "vocoder"):
        assert "file is a file: name a folder" in refusal("train", config, "--workdir", tmp_path / "file")


def test_the_vocoder_refuses_fields_that_it_does_not_read(refusal, tmp_path):
    fields = ("--set", "vocoder.width=8", "--set", "train.steps=5")
    line = refusal("train", "vocoder", "--workdir", tmp_path / "w", *fields)
    assert "--set train.steps=5: " in line and "and --steps: leave the others out" in line


def test_the_error_of_a_full_disk_names_the_workdir_if_it_names_no_file():
    with pytest.raises(OSError, match="run") as failed, train._named_disk("run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == "run"
    with pytest.raises(OSError, match="other") as failed, train._named_disk("run"):
        raise OSError(errno.ENOSPC, "No space left on device", "other")
