"""The folder of a run: what may change when a run resumes, and what is refused, with both values and the remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxtml import config as configs
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.train import loop, parameters, storage
from jaxtml.train.optimizer import rate_at, schedule

STEP = 6


@pytest.fixture
def config(small) -> Config:
    return dataclasses.replace(small, train=dataclasses.replace(small.train, steps=STEP, warmup=2))


@pytest.fixture
def run(tmp_path, config, data) -> Path:
    """The folder of a run that has saved a checkpoint of step 6. The checkpoint itself is never read here."""
    folder = tmp_path / "run"
    storage.claim(folder, config, data, "digest")
    (folder / "checkpoints" / str(STEP)).mkdir(parents=True)
    return folder


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings that are logged."""
    seen: list[str] = []
    for module in (storage, parameters, loop):
        monkeypatch.setattr(module.logging, "warning", lambda text, *args: seen.append(text % args))
    return seen


def longer(config: Config, *changes: str) -> Config:
    for change in ("train.steps=12", *changes):
        config = configs.override(config, change)
    return config


def test_another_learning_rate_is_refused_with_both_values_unless_the_run_may_change(run, config, data, warnings):
    other = longer(config, "train.learning_rate=.001", "train.text_weight=2")
    with pytest.raises(InputError) as refused:
        storage.claim(run, other, data, "digest")
    assert "train.learning_rate is 0.003 in the run and 0.001 now" in str(refused.value)
    assert "train.text_weight is 1.0 in the run and 2.0 now" in str(refused.value)
    assert "add --change-run" in str(refused.value)
    storage.claim(run, other, data, "digest", change_run=True)
    assert configs.from_json((run / "config.json").read_text()) == other
    lines = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": STEP, "field": "train.learning_rate", "before": 0.003, "now": 0.001}
    assert any("from step 7 on, train.text_weight is 1.0" in line for line in warnings)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.batch=4", "train.batch is 2 in the run and 4 now"),
        ("train.seed=1", "train.seed is 0 in the run and 1 now"),
        ("data.turns=13", "data.turns is 12 in the run and 13 now"),
        ("backbone.d_ff_dense=64", "backbone.d_ff_dense is 48 in the run and 64 now"),
    ],
)
def test_what_decides_the_model_or_the_data_cannot_change(run, config, data, change, named):
    with pytest.raises(InputError, match=f"{named}.*cannot change in a run.*name a new --workdir"):
        storage.claim(run, longer(config, change), data, "digest", change_run=True)
    assert configs.from_json((run / "config.json").read_text()) == config


def test_settings_of_the_server_may_change(run, config, data):
    storage.claim(run, longer(config, "serve.sessions=9"), data, "digest")


def test_a_longer_run_says_where_its_learning_rate_jumps(run, config, data, warnings):
    storage.claim(run, longer(config), data, "digest")
    (line,) = warnings
    rates = rate_at(schedule(config.train), STEP - 1), rate_at(schedule(longer(config).train), STEP)
    assert rates[0] < rates[1]
    assert f"from {rates[0]:.3g} at step 6 to {rates[1]:.3g} at step 7" in line
    assert "6 before, 12 now" in line


def test_a_run_that_is_made_longer_before_its_decay_has_no_jump(run, config, data, warnings):
    (run / "checkpoints" / str(STEP)).rename(run / "checkpoints" / "3")
    storage.claim(run, longer(config), data, "digest")
    assert warnings == []


def test_fewer_steps_than_done_are_refused_and_leave_the_run_alone(run, config, data):
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match="has done 6 steps, and 3 are asked for: give at least 6 with --steps"):
        storage.claim(run, longer(config, "train.steps=3"), data, "digest")
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_damaged_config_of_a_run_is_named(run, config, data, damage):
    (run / "config.json").unlink()
    if damage is not None:
        (run / "config.json").write_text(damage)
    with pytest.raises(InputError, match=r"run/config.json is (missing or )?damaged.*restore this file, or name a new"):
        storage.claim(run, config, data, "digest")


def test_a_missing_digest_of_the_data_is_named(run, config, data):
    (run / "data.txt").unlink()
    with pytest.raises(InputError, match=r"run/data.txt is missing or damaged"):
        storage.claim(run, config, data, "digest")


@pytest.mark.parametrize(("name", "is_folder"), [("checkpoints", False), ("tensorboard", False), ("log.jsonl", True)])
def test_a_part_of_the_folder_that_is_something_else_is_refused(tmp_path, config, data, name, is_folder):
    folder = tmp_path / "odd"
    (folder / name).mkdir(parents=True) if is_folder else folder.mkdir()
    if not is_folder:
        (folder / name).touch()
    with pytest.raises(InputError, match=f"{name} is a (file|folder), and a run needs .* name a new --workdir"):
        storage.claim(folder, config, data, "digest")
    with pytest.raises(InputError, match="is a file: name a folder"):
        storage.claim(data / "tokenizer.json", config, data, "digest")


def test_a_first_checkpoint_that_was_never_finished_claims_no_folder(tmp_path, config, data):
    folder = tmp_path / "killed"
    storage.claim(folder, config, data, "digest")
    (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    storage.claim(folder, longer(config, "train.batch=4"), data, "other digest")


def test_parameters_with_nan_are_refused_by_name():
    params = {"layers": {"wq": np.ones(3), "wk": np.array([1.0, np.nan])}, "embed": np.array([np.inf])}
    with pytest.raises(InputError, match="start cannot start this run: NaN or infinity in embed, layers/wk; take"):
        parameters.check_finite(params, "start")
    parameters.check_finite({"wq": np.zeros(2)}, "start")


def test_the_parts_that_a_release_lacks_are_named(release, releasable, warnings):
    source = WarmStart(open_checkpoint(release), releasable)
    parameters._warn_of_new_parts(release, source, False, warnings.append)
    new, voice = warnings
    assert (
        "has no clock, embedding of the model's own speech, flow head, drafter, vocoder: training begins with new"
        in new
    )
    assert voice.startswith("no trained vocoder")
    warnings.clear()
    parameters._warn_of_new_parts(release, source, True, warnings.append)
    assert len(warnings) == 1 and "vocoder" not in warnings[0]


def test_a_rate_that_stays_is_not_said_to_jump(run, config, data, warnings, monkeypatch):
    for last, expected in ((1e-3, 0), (2e-3, 1)):
        rates = iter((0.0, 1e-3, last))  # the next step's rate before and after the change, and the last step's rate
        monkeypatch.setattr(storage, "rate_at", lambda *_, rates=rates: next(rates))
        storage.claim(run, longer(config), data, "digest")
        storage.write_atomically(run / "config.json", configs.to_json(config))
        assert len(warnings) == expected


def test_a_warning_about_the_start_of_a_run_has_the_file_of_the_loop_in_the_log(caplog):
    loop._warn("100% of the clock is new")
    assert (caplog.records[-1].filename, caplog.records[-1].levelname) == ("loop.py", "WARNING")
    assert caplog.records[-1].getMessage() == "100% of the clock is new"


def test_a_run_of_the_vocoder_is_not_called_damaged(run, config, data):
    (run / "data.txt").unlink()
    (run / "training.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run of the vocoder alone: name a new --workdir"):
        storage.claim(run, config, data, "digest")


def test_arguments_that_a_resumed_run_does_not_read_are_named(tmp_path, warnings):
    loop._warn_of_unused(tmp_path, STEP, Path("start"), {})
    loop._warn_of_unused(tmp_path, STEP, None, None)
    (line,) = warnings
    assert line.startswith("--start-from and --vocoder: no effect") and "step 6" in line


def test_a_profile_that_does_not_fit_is_refused():
    loop._check_profile(0, 0)
    loop._check_profile(3, 7)
    with pytest.raises(InputError, match="--profile 3 needs 7 steps, .* and the run has 6 left: give more --steps"):
        loop._check_profile(3, 6)
