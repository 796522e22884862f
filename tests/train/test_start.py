"""A start that fails before its first step leaves the folder of the run as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxtml import config as configs
from jaxtml.errors import InputError
from jaxtml.train import loop, storage
from jaxtml.train.start import Start
from jaxtml.train.vocoder import storage as vocoder_storage


def start_and_fail(workdir: Path, has_step: bool = False, error: type[BaseException] = InputError, **claim) -> None:
    with pytest.raises(error), Start(workdir, storage.FOLDERS, storage.FILES) as start:
        storage.claim(workdir, **claim)
        (workdir / "checkpoints").mkdir(exist_ok=True)
        (workdir / "log.jsonl").open("a").close()
        if has_step:
            start.succeeded()
        raise error("stopped")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, MemoryError])
def test_a_failed_start_leaves_no_folder(small, data, tmp_path, error):
    start_and_fail(tmp_path / "new" / "run", error=error, config=small, data=data, data_digest="digest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_failed_start_keeps_what_others_put_into_the_folder(small, data, tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer.json").write_text("mine")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    start_and_fail(tmp_path / "run", config=small, data=data, data_digest="digest")
    assert content(tmp_path) == before and not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_fails_to_resume_keeps_its_settings(small, data, tmp_path):
    run, other = tmp_path / "run", configs.override(small, "train.learning_rate=0.1")
    storage.claim(run, small, data, "digest")
    (run / "checkpoints" / "1").mkdir(parents=True)
    before = content(run)
    options = {"config": other, "data": data, "data_digest": "digest", "change_run": True}
    start_and_fail(run, **options)
    assert {name: text for name, text in content(run).items() if text} == before
    storage.claim(run, small, data, "digest")
    start_and_fail(run, has_step=True, **options)
    assert configs.from_json((run / "config.json").read_text()) == other and (run / "changes.jsonl").is_file()


def test_a_start_whose_parameters_or_rows_fail_leaves_no_folder(small, data, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("no such thing")

    class NoRows:
        digest = "none"

    monkeypatch.setattr(loop, "open_dataset", lambda *_: NoRows())
    small = configs.override(small, "train.steps=1")
    with pytest.raises(InputError, match="nosuch"):
        loop.train(small, tmp_path / "run", data, start_from=tmp_path / "nosuch")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loop, "first_parameters", lambda *_: {})
    monkeypatch.setattr(loop, "make_train_step", lambda _: (lambda params: params, lambda state, batch: state))
    monkeypatch.setattr(loop, "BatchFeed", fail)
    with pytest.raises(InputError, match="no such thing"):
        loop.train(small, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_killed_start_of_another_kind_of_run_does_not_own_the_folder(small, data, tmp_path):
    settings = {"vocoder": {}, "training": {}, "steps": 1}
    vocoder_storage.claim(tmp_path / "a", small, settings)
    storage.claim(tmp_path / "b", small, data, "digest")
    storage.claim(tmp_path / "a", small, data, "digest")
    vocoder_storage.claim(tmp_path / "b", small, settings)
    for name in "ab":
        (tmp_path / name / "checkpoints" / "1").mkdir(parents=True)
    storage.claim(tmp_path / "a", small, data, "digest")
    vocoder_storage.claim(tmp_path / "b", small, settings)
