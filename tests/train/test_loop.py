"""The training loop: a run that is stopped, killed or fed by other workers has the numbers of an uninterrupted run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import tones

from jaxtml import config as configs
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.commands import main as cli
from jaxtml.config import Config, TrainConfig
from jaxtml.data import pipeline
from jaxtml.data.conversations import GeneratedConversations
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params, init_params
from jaxtml.parallel.mesh import MeshShape
from jaxtml.session.engine import Engine
from jaxtml.stream.text import TextCodec
from jaxtml.train import feed, loop, samples
from jaxtml.train.loop import train
from jaxtml.train.step import Init, Step, TrainState, make_train_step
from jaxtml.train.vocoder.storage import load_vocoder

STEPS = 6
# Trains in a process of its own. The process kills itself while it waits for the sixth batch: by then a checkpoint is
# being written.
KILLED = """
import os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)  # as in the process that it is compared with
from jaxtml import config
from jaxtml.train import feed, loop

all_batches = feed.batches

def until_killed(*args, **options):
    for number, batch in enumerate(all_batches(*args, **options)):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

feed.batches = until_killed
loop.train(config.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), workers=0)
"""


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Two layers, no pictures."""
    return dataclasses.replace(
        small,
        backbone=dataclasses.replace(small.backbone, n_layers=2, global_layers=(1,)),
        duplex=dataclasses.replace(small.duplex, max_patches=0),
        data=dataclasses.replace(small.data, turns=25, tokens=192),
        train=dataclasses.replace(small.train, steps=STEPS, checkpoint_every=3),
    )


@pytest.fixture(scope="module", autouse=True)
def programs_made_once() -> Iterator[None]:
    """Runs of equal models on equal meshes share their traced and compiled programs, as the steps of one run do."""
    engines: dict[Config, Engine] = {}

    @functools.cache
    def step_of(config: Config, placement: Placement) -> tuple[Init, Step]:
        return make_train_step(InteractionModel(config, placement))

    def sampling_engine(config: Config, params: Params, codec: TextCodec) -> Engine:
        key = dataclasses.replace(config, train=TrainConfig())  # a sampler gives the engine its parameters by itself
        if key not in engines:
            engines[key] = Engine.create(config, params, codec)
        return engines[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "make_train_step", lambda model: step_of(model.config, model.placement))
        patched.setattr(samples, "Engine", SimpleNamespace(create=sampling_engine))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory, codec) -> Path:
    """A data folder as `jaxtml data` makes it. Its voices are tones instead of speech."""
    folder = tmp_path_factory.mktemp("data")
    tones.write_data_folder(folder, codec)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(config, data, tmp_path_factory) -> tuple[Path, TrainState]:
    """The folder and the last state of a run that nothing interrupts, fed by a worker process."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, jax.device_get(train(config, workdir, data, workers=1))


def assert_same(a: object, b: object) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_training_changes_the_parameters_and_leaves_its_last_checkpoints(config, uninterrupted):
    workdir, state = uninterrupted
    assert int(state.step) == STEPS
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    start = init_params(InteractionModel(config).specs(), config.train.seed)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), start, state.params)
    vocoder = changed.pop("vocoder")
    assert not any(jax.tree.leaves(vocoder))
    assert np.mean(jax.tree.leaves(changed)) > 0.8, "a few arrays have no gradient at first, because zeros follow them"


def test_a_run_that_stops_and_resumes_ends_bit_for_bit_as_an_uninterrupted_run(
    config, data, uninterrupted, tmp_path, monkeypatch
):
    def interrupted(*args: Any, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        yield from itertools.islice(pipeline.batches(*args, **options), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(feed, "batches", interrupted)
        train(config, tmp_path, data, workers=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    resumed = train(config, tmp_path, data, workers=0)
    assert_same(resumed, uninterrupted[1])


def test_a_run_that_was_killed_resumes_and_ends_as_an_uninterrupted_run(config, data, uninterrupted, tmp_path):
    workdir, resolved = tmp_path / "run", tmp_path / "config.json"
    resolved.write_text(configs.to_json(config))
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(resolved), str(workdir), str(data)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (workdir / "checkpoints").is_dir() and not (workdir / "samples").exists()
    assert_same(train(config, workdir, data, workers=0), uninterrupted[1])


def test_a_run_on_eight_devices_resumes_on_another_mesh_and_ends_as_an_uninterrupted_run(
    config, data, tmp_path, monkeypatch
):
    wide = configs.override(config, "train.batch=8")
    first, second = MeshShape(data=4, expert=2), MeshShape(replica=2, data=2, expert=2)
    uninterrupted = jax.device_get(train(wide, tmp_path / "uninterrupted", data, workers=0, mesh=first))

    def interrupted(*args: Any, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        yield from itertools.islice(pipeline.batches(*args, **options), 4)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(feed, "batches", interrupted)
        train(wide, tmp_path / "run", data, workers=0, mesh=first)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    resumed = jax.device_get(train(wide, tmp_path / "run", data, workers=0, mesh=second))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), resumed.params, uninterrupted.params
    )
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("run", "uninterrupted")]
    assert np.isfinite(losses).all()


def test_three_skipped_steps_in_a_row_end_the_run_and_save_their_batch(config, data, tmp_path):
    strict = configs.override(configs.override(config, "train.norm_limit=1e-6"), "train.steps=40")
    with pytest.raises(InputError, match="were skipped: .* the first batch is in") as stopped:
        train(strict, tmp_path, data, workers=0)
    assert "\n" not in str(stopped.value)
    (saved,) = tmp_path.glob("unsound_*.npz")
    assert saved.name == "unsound_000001.npz"
    with np.load(saved) as batch:
        assert batch["kind"].shape == (config.train.batch, config.data.tokens) and batch["kind"].any()


def test_a_transport_that_cpus_lack_is_refused_before_a_folder_is_made(config, data, tmp_path):
    ragged = configs.override(configs.override(config, "train.transport=ragged"), "train.batch=8")
    with pytest.raises(InputError, match="a CPU has no ragged_all_to_all"):
        train(ragged, tmp_path / "run", data, mesh=MeshShape(data=4, expert=2))
    assert not (tmp_path / "run").exists()


def test_starting_a_finished_run_again_changes_nothing(config, data, uninterrupted):
    workdir, state = uninterrupted
    log = (workdir / "log.jsonl").read_bytes()
    assert_same(train(config, workdir, data, workers=0), state)
    assert (workdir / "log.jsonl").read_bytes() == log


def test_the_log_has_every_term_and_the_speed(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [STEPS]
    names = {"loss", "gate", "heard", "text", "flow", "router_z", "gate_right", "heard_right", "text_right"}
    assert names | {"tokens_per_s", "grad_norm", "skipped", "load_max", "load_min"} <= lines[0].keys()
    figures = [value for name, value in lines[0].items() if name != "load_by_layer"]
    assert np.isfinite([*figures, *lines[0]["load_by_layer"]]).all() and lines[0]["load_by_layer"]
    assert lines[0]["skipped"] == 0 and lines[0]["tokens_per_s"] > 0
    assert 0 < lines[0]["learning_rate"] <= 3e-3


def test_the_samples_are_conversations_that_can_be_heard_and_read(config, uninterrupted):
    folder = uninterrupted[0] / "samples" / f"{STEPS:06}"
    text = (folder / "samples.txt").read_text()
    assert text.count("  heard ") == text.count("  right ") == text.count("  said ") == 4
    for i in range(4):
        wave, rate = soundfile.read(folder / f"{i}.wav")
        assert rate == 16_000 and wave.shape == (config.data.turns * 3200, 2)
    assert any((uninterrupted[0] / "tensorboard").iterdir())


def test_a_run_is_read_back_at_its_newest_step(config, codec, uninterrupted):
    workdir, state = uninterrupted
    read_config, params = read_checkpoint(workdir)
    assert read_config == config
    assert TextCodec.load(workdir / "tokenizer.json").encode("forty two") == codec.encode("forty two")
    assert_same(params, state.params)


def test_reading_a_run_without_a_checkpoint_is_one_clear_line(config, tmp_path):
    with pytest.raises(InputError, match="has no config.json, so it is no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has no checkpoint yet: wait until the training run"):
        read_checkpoint(tmp_path)


def test_a_run_is_neither_a_checkpoint_nor_a_vocoder(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(InputError, match="is a training run: make a checkpoint of it"):
        load_checkpoint(workdir)
    with pytest.raises(InputError, match="holds no vocoder run"):
        load_vocoder(workdir)


def test_a_run_starts_from_the_parameters_of_a_checkpoint(config, data, uninterrupted, tmp_path):
    start = tmp_path / "start"
    save_checkpoint(start, config, uninterrupted[1].params, tokenizer_path=data / "tokenizer.json")
    done = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=0.0, bias_rate=0.0))
    state = train(done, tmp_path / "run", data, workers=0, start_from=start)
    assert int(state.step) == STEPS
    assert_same(state.params, uninterrupted[1].params)


def test_a_checkpoint_of_another_size_or_tokenizer_starts_no_run(config, data, uninterrupted, tmp_path):
    start = tmp_path / "start"
    save_checkpoint(start, config, uninterrupted[1].params, tokenizer_path=data / "tokenizer.json")
    wider = dataclasses.replace(config, flow=dataclasses.replace(config.flow, depth=config.flow.depth + 1))
    with pytest.raises(InputError, match="its flow.* is of another size"):
        train(wider, tmp_path / "run", data, workers=0, start_from=start)
    (start / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"its tokenizer.json differs from the tokenizer of"):
        train(config, tmp_path / "other", data, workers=0, start_from=start)


@pytest.mark.parametrize("change", ["train.learning_rate=0.1", "backbone.d_ff_dense=64", "data.seed=2", "name=other"])
def test_a_run_of_another_config_is_refused_and_left_alone(config, data, uninterrupted, change):
    workdir, _ = uninterrupted
    before = (workdir / "config.json").read_bytes()
    field = change.partition("=")[0]
    with pytest.raises(InputError, match=f"holds a run of another config .{field} is .* now.* name a new --workdir"):
        train(configs.override(config, change), workdir, data)
    assert (workdir / "config.json").read_bytes() == before


def test_data_that_are_not_there_are_one_clear_line_and_claim_no_folder(config, codec, data, tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        train(config, tmp_path / "run", tmp_path)
    codec.save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="bank"):
        train(config, tmp_path / "run", tmp_path)
    small_vocabulary = configs.override(config, "duplex.control_base=200")
    with pytest.raises(InputError, match=f"has {codec.size} entries, small_test has room for 200"):
        train(small_vocabulary, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_run_on_data_that_have_changed_is_refused(config, data, uninterrupted, monkeypatch):
    workdir, _ = uninterrupted
    monkeypatch.setattr(GeneratedConversations, "digest", "of a bank that has grown")
    with pytest.raises(InputError, match="holds a run on other data .* name a new --workdir"):
        train(config, workdir, data)


def test_a_checkpoint_that_cannot_start_the_run_leaves_no_folder(config, data, tmp_path):
    start = tmp_path / "start"
    save_checkpoint(start, config, init_params(InteractionModel(config).specs(), 0))
    (start / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer"):
        train(config, tmp_path / "run", data, workers=0, start_from=start)
    assert not (tmp_path / "run").exists()


def test_the_command_line_writes_rows_shows_them_and_trains_on_them(config, data, uninterrupted, tmp_path, capsys):
    """Runs `jaxtml data` and `jaxtml train` on a folder whose bank of utterances is built already.

    The first command writes a cache of 64 rows. The second one reads them in another order than `uninterrupted` did.
    """
    resolved, own = tmp_path / "config.json", tmp_path / "data"
    resolved.write_text(configs.to_json(config))
    shutil.copytree(data, own)
    for command in (
        ["data", str(resolved), "--out", str(own), "--no-build", "--rows", "64", "--show", "1"],
        [
            "train",
            str(resolved),
            "--workdir",
            str(tmp_path / "run"),
            "--data",
            str(own),
            "--steps",
            str(STEPS),
            "--mesh",
            "data=1",
        ],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.run(["jaxtml", *command])
        assert not ended.value.code, capsys.readouterr().err
    assert list((own / "examples").glob("*.wav")) and list((own / "examples").glob("*.png"))
    assert (tmp_path / "run" / "data.txt").read_text().endswith(" cache of 64")
    assert int(read_checkpoint(tmp_path / "run")[0].train.steps) == STEPS
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS and np.isfinite(log[-1]["loss"])
