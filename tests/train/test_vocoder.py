"""Training the vocoder: pitch labels, loss terms, and a run that resumes with the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.config import AttentionConfig, BackboneConfig, Config, DuplexConfig, FlowConfig, VocoderConfig
from jaxtml.errors import InputError
from jaxtml.model.spec import init_params
from jaxtml.model.speech.vocoder import param_specs
from jaxtml.stream.dmel import fine_log_mel
from jaxtml.stream.timebase import FINE_HOP, SAMPLE_RATE
from jaxtml.train.vocoder import storage
from jaxtml.train.vocoder.data import join_recordings, make_batch, read_recordings
from jaxtml.train.vocoder.loss import mel_loss, stft_loss
from jaxtml.train.vocoder.pitch import track_pitch
from jaxtml.train.vocoder.storage import load_vocoder
from jaxtml.train.vocoder.training import VocoderTraining, loss_fn, train_vocoder

SMALL = VocoderConfig(width=16, depth=1, expansion=2, kernel=3)
QUICK = VocoderTraining(rows=2, length=24, warm=8, report_every=2, checkpoint_every=2)


def spoken(hz: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns a buzz `[N]` float32 with the pitch `hz` `[N]`, a falling spectrum and a little noise."""
    phase = 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE
    buzz = sum(np.cos(k * phase) * (1 / (1 + (k * hz / 700) ** 2)) for k in range(1, 15))
    noise = np.random.default_rng(seed).standard_normal(len(hz))
    return (0.05 * buzz + 0.001 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def voice():
    seconds = np.linspace(0, 1, SAMPLE_RATE)
    return join_recordings([spoken(180 + 60 * np.sin(5 * seconds)), spoken(np.full(SAMPLE_RATE, 140.0), 1)])


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A bank on disk with two utterances of the assistant and one of a user."""
    folder = tmp_path / "bank"
    folder.mkdir()
    waves = [spoken(np.full(SAMPLE_RATE, hz)) for hz in (150.0, 210.0, 90.0)]
    rows, offset = [], 0
    for wave, role in zip(waves, ("assistant", "assistant", "user"), strict=True):
        item = {"role": role, "split": "train", "voice": "kokoro:af_heart", "text": "yes", "rate": 1.0, "pitch": 1.0}
        rows.append({**item, "offset": offset, "length": len(wave), "words": [["yes", 0.0, 1.0]]})
        offset += len(wave)
    pcm = np.round(np.concatenate(waves) * 32767).astype("<i2").tobytes()
    rows.insert(0, {"sha256": hashlib.sha256(pcm).hexdigest(), "bytes": len(pcm)})
    (folder / "00000.pcm").write_bytes(pcm)
    (folder / "00000.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "bank.json").write_text(json.dumps({"format": 1, "plan": "test", "shards": 1, "items": 3}))
    return folder


def config() -> Config:
    attention = AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=8, window=8, rel_extent=8)
    backbone = BackboneConfig(
        vocab_size=64, d_model=8, n_layers=1, n_dense=1, global_layers=(), sliding=attention, global_=attention,
        d_ff_dense=8, d_ff_expert=8, n_experts=2, experts_per_token=1, n_shared_experts=1, logits_divisor=1.0,
    )  # fmt: skip
    return Config("test", backbone, DuplexConfig(control_base=48), FlowConfig(8, 1), vocoder=SMALL)


def test_pitch_follows_a_glide_and_is_absent_in_silence_and_noise():
    hz = np.linspace(100, 300, SAMPLE_RATE)
    noise = 0.05 * np.random.default_rng(1).standard_normal(SAMPLE_RATE)
    wave = np.concatenate([spoken(hz), np.zeros(SAMPLE_RATE), noise]).astype(np.float32)
    found, voiced = track_pitch(wave)
    middle = slice(4, 76)
    truth = hz[(np.arange(80) + 1) * FINE_HOP - 1]
    assert voiced[middle].all()
    assert np.abs(np.log2(found[middle] / truth[middle])).max() < 0.02
    assert not voiced[84:156].any()
    assert voiced[164:236].mean() < 0.1


def test_a_batch_depends_on_seed_and_step_alone_and_its_frames_belong_to_its_wave(voice):
    one, again = (make_batch(voice, 3, 7, 8, 40) for _ in range(2))
    other = make_batch(voice, 3, 8, 8, 40)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.frames, other.frames)
    # Away from the ends of the segment, a row's frames are those of its wave; about half of the rows are disturbed.
    recomputed = np.stack([fine_log_mel(np.asarray(wave)) for wave in one.wave])[:, 4:-4]
    difference = np.median(np.abs(recomputed - np.asarray(one.frames)[:, 4:-4]), axis=(1, 2))
    assert (difference < 1.0).all()
    assert 2 <= (difference < 1e-3).sum() <= 6


def test_equal_waves_cost_nothing_and_half_the_level_costs_log_two():
    wave = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9600)), jnp.float32)
    assert all(float(term) < 1e-6 for term in (*stft_loss(wave, wave), mel_loss(wave, wave)))
    logs, convergence = stft_loss(0.5 * wave, wave)
    np.testing.assert_allclose(logs, np.log(2), rtol=1e-3)
    np.testing.assert_allclose(convergence, 0.5, rtol=1e-3)
    np.testing.assert_allclose(mel_loss(0.5 * wave, wave), np.log10(2), rtol=1e-3)


def test_silence_has_a_gradient():
    silence = jnp.zeros((1, 9600))
    grad = jax.grad(lambda wave: sum(stft_loss(wave, silence)))(silence)
    assert bool(jnp.isfinite(grad).all())


def test_the_voice_is_read_at_three_speeds_and_users_are_a_quarter_at_most(bank):
    waves = read_recordings([bank])
    assert sorted(round(len(wave) / SAMPLE_RATE, 1) for wave in waves) == [0.9, 0.9, 1.0, 1.0, 1.0, 1.1, 1.1]


def test_every_parameter_learns_from_every_batch(voice):
    params = init_params(param_specs(SMALL), 0)
    grads = jax.jit(jax.grad(lambda p, b: loss_fn(SMALL, QUICK, p, b)[0]))(params, make_batch(voice, 0, 0, 2, 24))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_a_stopped_run_resumes_with_the_same_numbers(bank, tmp_path, monkeypatch):
    uninterrupted = train_vocoder(config(), [bank], tmp_path / "uninterrupted", 6, QUICK)
    import jaxtml.train.vocoder.training as module

    def stop_at_five(voice, seed, step, rows, length):
        if step == 5:
            raise KeyboardInterrupt
        return make_batch(voice, seed, step, rows, length)

    monkeypatch.setattr(module, "make_batch", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        train_vocoder(config(), [bank], tmp_path / "stopped", 6, QUICK)
    monkeypatch.undo()
    resumed = train_vocoder(config(), [bank], tmp_path / "stopped", 6, QUICK)
    jax.tree.map(np.testing.assert_array_equal, uninterrupted, resumed)
    jax.tree.map(np.testing.assert_array_equal, uninterrupted, load_vocoder(tmp_path / "stopped")[1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_a_models_checkpoint_gives_its_vocoder(small, params, tmp_path):
    save_checkpoint(tmp_path / "model", small, params)
    config, vocoder = load_vocoder(tmp_path / "model")
    assert config == small
    jax.tree.map(np.testing.assert_array_equal, vocoder, params["vocoder"])


def test_start_from_is_offered_only_to_a_run_of_the_same_sizes(tmp_path):
    settings = {"vocoder": {"width": 8}, "training": {"seed": 0}, "steps": 5}
    storage.claim(tmp_path, config(), settings)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match="steps is 5 in the run and 6 now.*name a new --workdir, with --start-from"):
        storage.claim(tmp_path, config(), settings | {"steps": 6})
    with pytest.raises(InputError, match="vocoder.width is 8 in the run and 9 now.*or name a new --workdir$"):
        storage.claim(tmp_path, config(), settings | {"vocoder": {"width": 9}})


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="jaxtml train vocoder"):
        load_vocoder(tmp_path)


def test_other_settings_a_damaged_checkpoint_and_a_bank_without_the_voice_are_refused(bank, tmp_path):
    train_vocoder(config(), [bank], tmp_path / "run", 1, QUICK)
    with pytest.raises(InputError, match="other settings"):
        train_vocoder(config(), [bank], tmp_path / "run", 1, dataclasses.replace(QUICK, seed=1))
    for path in (tmp_path / "run" / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"")
    with pytest.raises(InputError, match="the checkpoint of step 1 is damaged"):
        load_vocoder(tmp_path / "run")
    index = bank / "00000.jsonl"
    index.write_text(index.read_text().replace('"assistant"', '"user"'))
    with pytest.raises(InputError, match="assistant"):
        train_vocoder(config(), [bank], tmp_path / "other", 1, QUICK)


def test_a_run_that_never_began_keeps_its_folder_from_nobody(bank, tmp_path):
    with pytest.raises(InputError, match="bank"):
        train_vocoder(config(), [tmp_path / "nothing"], tmp_path / "run", 1, QUICK)
    assert not (tmp_path / "run").exists()
    storage.claim(tmp_path / "run", config(), {"steps": 1})
    storage.claim(tmp_path / "run", config(), {"steps": 2})


def test_a_vocoder_run_names_the_settings_that_differ_and_its_damaged_files(tmp_path):
    storage.claim(tmp_path, config(), {"steps": 2, "training": {"seed": 0}})
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"\(steps is 2 in the run and 3 now, training.seed is 0 in the run and 1 now\)"
    ):
        storage.claim(tmp_path, config(), {"steps": 3, "training": {"seed": 1}})
    for damage in ("", "[]", "{"):
        (tmp_path / "training.json").write_text(damage)
        with pytest.raises(InputError, match=r"training.json is missing or damaged.* restore this file, or name a new"):
            storage.claim(tmp_path, config(), {"steps": 2})
    (tmp_path / "data.txt").touch()
    with pytest.raises(InputError, match="holds a run of a whole model"):
        storage.claim(tmp_path, config(), {"steps": 2})


def test_a_vocoder_run_starts_from_another_and_refuses_one_of_other_sizes(bank, tmp_path):
    first = train_vocoder(config(), [bank], tmp_path / "first", 1, QUICK)
    still = dataclasses.replace(QUICK, learning_rate=0.0)
    second = train_vocoder(config(), [bank], tmp_path / "second", 1, still, start_from=tmp_path / "first")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    line = json.loads((tmp_path / "second" / "log.jsonl").read_text())
    assert line["learning_rate"] == 0.0
    wider = dataclasses.replace(config(), vocoder=dataclasses.replace(SMALL, width=24))
    with pytest.raises(InputError, match="its vocoder has other sizes .vocoder.width is 16 there and 24 in this run"):
        train_vocoder(wider, [bank], tmp_path / "third", 1, QUICK, start_from=tmp_path / "first")


def test_a_vocoder_with_nan_starts_no_run(bank, small, params, tmp_path):
    broken = jax.tree.map(lambda p: np.full_like(p, np.nan), params["vocoder"])
    save_checkpoint(tmp_path / "model", small, params | {"vocoder": broken})
    same_size = dataclasses.replace(config(), vocoder=small.vocoder)
    with pytest.raises(InputError, match="model cannot start this run: NaN or infinity in vocoder"):
        train_vocoder(same_size, [bank], tmp_path / "run", 1, QUICK, start_from=tmp_path / "model")


def test_a_damaged_vocoder_run_does_not_resume(bank, tmp_path):
    train_vocoder(config(), [bank], tmp_path / "run", 1, QUICK)
    for path in (tmp_path / "run" / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"")
    with pytest.raises(InputError, match="the checkpoint of step 1 is damaged .*: train a vocoder in a new --workdir"):
        train_vocoder(config(), [bank], tmp_path / "run", 1, QUICK)
