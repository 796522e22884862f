"""The command line as a user meets it: what it prints, what it writes, one clear line for each kind of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.commands.main import main, parser
from jaxtml.model.spec import flatten

RATE = 16_000


@pytest.fixture(scope="session")
def checkpoint(small, params, codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    codec.save(folder / "tokenizer.json")
    save_checkpoint(folder / "small", small, params, None, folder / "tokenizer.json")
    return folder / "small"


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "user.wav"
    wave = 0.1 * np.random.default_rng(0).standard_normal(round(1.3 * RATE))
    soundfile.write(path, wave, RATE)
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `jaxtml argv`."""
    try:
        status = main(parser().parse_args([str(a) for a in argv]))
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *argv: object) -> str:
    """The one line that a refused command prints."""
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("jaxtml ")]
    assert len(lines) == 1, err
    assert not out
    return lines[0]


@pytest.mark.parametrize("command", ["info", "converse", "logits", "train", "data", "plan", "convert"])
def test_every_command_has_help_with_an_example(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"example: jaxtml {command}" in out


def test_info_counts_parameters_by_group(capsys):
    status, out, _ = run(capsys, "info", "tiny", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["params_total"] <= 12_000_000
    assert result["params_total"] == sum(group["total"] for group in result["groups"].values())
    assert result["params_active"] < result["params_total"]
    assert result["config"]["backbone"]["d_model"] == 192


def test_set_overrides_a_field(capsys):
    _, out, _ = run(capsys, "info", "tiny", "--json", "--set", "backbone.n_experts=16")
    _, before, _ = run(capsys, "info", "tiny", "--json")
    assert json.loads(out)["config"]["backbone"]["n_experts"] == 16
    assert json.loads(out)["params_total"] > json.loads(before)["params_total"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("nosuch",), "no config 'nosuch'"),
        (("tiny", "--set", "backbone.depth=3"), "no field 'depth'"),
        (("tiny", "--set", "train.steps=soon"), "'soon' is not int"),
        (("tiny", "--set", "train.steps"), "path.to.field=value"),
        (("tiny", "--set", "backbone.experts_per_token=9"), "there are 8 experts"),
    ],
)
def test_info_refuses_what_is_no_config(capsys, argv, says):
    assert says in refused(capsys, "info", *argv)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("tml_interaction_small", (276e9, 0.005), (12e9, 0.04)), ("inkling_small", (263.85e9, 0.001), (11.2e9, 0.01))],
)
def test_info_counts_the_large_models_without_their_weights(capsys, name, total, active):
    status, out, _ = run(capsys, "info", name, "--json")
    result = json.loads(out)
    assert status == 0
    for key, (wanted, within) in (("params_total", total), ("params_active", active)):
        assert abs(result[key] / wanted - 1) <= within, (key, result[key])
    assert {"routed experts", "shared experts", "attention", "towers", "flow head"} <= result["groups"].keys()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--topology", "v9:4x4"), "no chip 'v9'; there are v5e, v5p, v6e, tpu7x"),
        (("--topology", "v5p:4x4x9"), "v5p comes as 4x4x8"),
        (("--topology", "v5p:4x4x8", "--mesh", "date=4"), "no axis 'date'"),
        (("--topology", "v5p:4x4x8", "--set", "train.batch=100"), "train.batch 100 does not divide into 128 parts"),
    ],
)
def test_plan_refuses_what_does_not_fit(capsys, argv, says):
    assert says in refused(capsys, "plan", "tml_interaction_small", *argv)


def test_converse_keeps_the_length_and_clock_of_its_input(capsys, checkpoint, recording, tmp_path):
    out = tmp_path / "reply.wav"
    files = ("--events", tmp_path / "e.jsonl", "--stereo", tmp_path / "s.wav", "--picture", tmp_path / "t.png")
    status, printed, _ = run(
        capsys, "converse", "--checkpoint", checkpoint, "--in", recording, "--out", out, *files, "--json"
    )
    assert status == 0
    assert json.loads(printed)["seconds"] == 1.3
    user, rate = soundfile.read(recording, dtype="float32")
    reply, reply_rate = soundfile.read(out, dtype="float32")
    assert (rate, len(user)) == (reply_rate, len(reply))
    assert np.abs(reply[:3200]).max() == 0, "nothing is said before anything was heard"
    both, _ = soundfile.read(tmp_path / "s.wav", dtype="float32")
    np.testing.assert_array_equal(both[:, 1], reply)
    np.testing.assert_allclose(both[:, 0], user, atol=1e-4)
    events = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [event["t_ms"] for event in events] == [0, 200, 400, 600, 800, 1000, 1200]
    assert set(events[0]) == {"t_ms", "gate", "p_speak", "heard", "text", "delegate", "step_ms"}
    for event in events:
        window = reply[(event["t_ms"] + 200) * 16 : (event["t_ms"] + 400) * 16]
        before = [e["gate"] for e in events if e["t_ms"] == event["t_ms"] - 200]
        if event["gate"] == "listen" and before != ["speak"]:
            assert not np.abs(window).any(), "a closed gate is silent"
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_converse_with_one_seed_says_the_same_twice(capsys, checkpoint, recording, tmp_path):
    for name in ("a.wav", "b.wav"):
        run(capsys, "converse", "--checkpoint", checkpoint, "--in", recording, "--out", tmp_path / name, "--seed", 3)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_converse_resamples_a_48_khz_stereo_mp3(capsys, checkpoint, tmp_path):
    noise = 0.1 * np.random.default_rng(1).standard_normal((48_000, 2))
    soundfile.write(tmp_path / "user.mp3", noise, 48_000, format="MP3")
    argv = ("--checkpoint", checkpoint, "--in", tmp_path / "user.mp3", "--out", tmp_path / "reply.wav", "--json")
    status, printed, _ = run(capsys, "converse", *argv)
    assert status == 0
    assert abs(json.loads(printed)["seconds"] - 1.0) < 0.1


def bad_recordings(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that no one can converse with, and what the refusal has to name."""
    (folder / "text.wav").write_text("not sound")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(8 * RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(800), RATE)
    return {
        "missing": (folder / "missing.wav", "missing.wav"),
        "folder": (folder, str(folder)),
        "text": (folder / "text.wav", "text.wav"),
        "empty": (folder / "empty.wav", "empty.wav"),
        "none": (folder / "none.wav", "none.wav"),
        "nan": (folder / "nan.wav", "nan.wav"),
        "short": (folder / "short.wav", "lasts 50 ms"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "none", "nan", "short"])
def test_converse_refuses_a_bad_recording_and_writes_nothing(capsys, checkpoint, tmp_path, kind):
    path, says = bad_recordings(tmp_path)[kind]
    out = tmp_path / "reply.wav"
    assert says in refused(capsys, "converse", "--checkpoint", checkpoint, "--in", path, "--out", out)
    assert not out.exists()


def test_converse_refuses_bad_checkpoints_folders_and_video(capsys, checkpoint, recording, tmp_path):
    out = tmp_path / "reply.wav"
    nowhere = ("converse", "--in", recording, "--out", out, "--checkpoint", tmp_path / "nowhere")
    assert "no checkpoint directory" in refused(capsys, *nowhere)
    (tmp_path / "empty").mkdir()
    no_checkpoint = ("converse", "--in", recording, "--out", out, "--checkpoint", tmp_path / "empty")
    assert "is not a jaxtml checkpoint" in refused(capsys, *no_checkpoint)
    no_folder = ("converse", "--checkpoint", checkpoint, "--in", recording, "--out", tmp_path / "no" / "reply.wav")
    assert "there is no folder" in refused(capsys, *no_folder)
    video = ("converse", "--checkpoint", checkpoint, "--in", recording, "--out", out, "--video", recording)
    assert "holds no video" in refused(capsys, *video)
    assert not out.exists()


def test_converse_refuses_a_checkpoint_of_another_size(capsys, checkpoint, recording, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["backbone"]["d_ff_dense"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    argv = ("converse", "--checkpoint", other, "--in", recording, "--out", tmp_path / "reply.wav")
    assert "does not have the sizes of its config.json" in refused(capsys, *argv)


def test_logits_are_those_of_the_model_and_bad_tokens_are_refused(capsys, checkpoint, small, params, tmp_path):
    ids = np.random.default_rng(0).integers(0, small.backbone.vocab_size, (2, 30))
    np.save(tmp_path / "ids.npy", ids)
    argv = ("logits", "--checkpoint", checkpoint, "--out", tmp_path / "logits.npy", "--tokens")
    status, _, _ = run(capsys, *argv, tmp_path / "ids.npy")
    result = np.load(tmp_path / "logits.npy")
    assert status == 0
    assert result.shape == (2, 30, small.backbone.vocab_size)
    assert result.dtype == np.float32
    np.save(tmp_path / "one.npy", ids[0, :10])
    run(capsys, *argv, tmp_path / "one.npy")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy")[0], result[0, :10], atol=1e-4)
    np.save(tmp_path / "big.npy", ids + 1000)
    assert "must lie in 0..299" in refused(capsys, *argv, tmp_path / "big.npy")
    np.save(tmp_path / "float.npy", ids * 1.0)
    assert "integer array" in refused(capsys, *argv, tmp_path / "float.npy")
    assert "no token file" in refused(capsys, *argv, tmp_path / "absent.npy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_goes_to_the_released_layout_and_back(capsys, small, lively, tmp_path, dtype):
    # Inkling knows one number for window and relative extent of sliding layers.
    sliding = replace(small.backbone.sliding, rel_extent=small.backbone.sliding.window)
    config = replace(small, backbone=replace(small.backbone, sliding=sliding))
    params = lively(config)
    save_checkpoint(tmp_path / "ours", config, params)
    status, out, err = run(
        capsys, "convert", tmp_path / "ours", tmp_path / "hf", "--to", "hf", "--dtype", dtype, "--verify"
    )
    assert status == 0, err
    assert "verified" in out
    status, out, err = run(capsys, "convert", tmp_path / "hf", tmp_path / "back", "--verify")
    assert status == 0, err
    before, back = dict(flatten(params)), dict(flatten(load_checkpoint(tmp_path / "back")[1]))
    for path in before:
        if path.startswith("layers/") or path in ("unembed", "norm/weight", "audio/weight"):
            wanted = np.asarray(before[path])
            if not path.endswith(("router_bias", "mlp/global_scale")) or dtype == "float32":
                wanted = wanted.astype(jnp.dtype(dtype)).astype(np.float32)
                np.testing.assert_array_equal(np.asarray(back[path]), wanted, err_msg=path)
    assert "name a new directory" in refused(capsys, "convert", tmp_path / "ours", tmp_path / "back")
    assert "no checkpoint directory" in refused(capsys, "convert", tmp_path / "none", tmp_path / "x")


def test_train_and_data_refuse_what_is_not_there(capsys, tmp_path):
    assert "no tokenizer" in refused(capsys, "train", "tiny", "--workdir", tmp_path / "w", "--data", tmp_path)
    assert not (tmp_path / "w").exists(), "nothing is made for a run that cannot start"
    none = ("data", "tiny", "--out", tmp_path / "d", "--no-build", "--show", 1)
    assert "bank" in refused(capsys, *none)


def test_the_module_runs_as_a_program_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtml", "info", "nosuch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("jaxtml info: no config 'nosuch'")
