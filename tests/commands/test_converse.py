"""`jaxtml converse` writes a reply that is aligned with its input, and refuses bad input before it writes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxtml.stream.timebase import SAMPLE_RATE


def test_converse_keeps_the_length_and_clock_of_its_input(jaxtml, checkpoint, recording, tmp_path):
    out = tmp_path / "reply.wav"
    files = ("--events", tmp_path / "e.jsonl", "--stereo", tmp_path / "s.wav", "--picture", tmp_path / "t.png")
    status, printed, _ = jaxtml(
        "converse", "--checkpoint", checkpoint, "--in", recording, "--out", out, *files, "--json"
    )
    assert status == 0
    assert json.loads(printed)["seconds"] == 1.3
    user, rate = soundfile.read(recording, dtype="float32")
    reply, reply_rate = soundfile.read(out, dtype="float32")
    assert (rate, len(user)) == (reply_rate, len(reply))
    assert np.abs(reply[:3200]).max() == 0, "the model says nothing before it has heard anything"
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
            assert not np.abs(window).any(), "the model makes no sound while it listens"
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_converse_gives_the_same_reply_for_the_same_seed(jaxtml, checkpoint, recording, tmp_path):
    for name in ("a.wav", "b.wav"):
        jaxtml("converse", "--checkpoint", checkpoint, "--in", recording, "--out", tmp_path / name, "--seed", 3)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_converse_resamples_a_48_khz_stereo_mp3(jaxtml, checkpoint, tmp_path):
    noise = 0.1 * np.random.default_rng(1).standard_normal((48_000, 2))
    soundfile.write(tmp_path / "user.mp3", noise, 48_000, format="MP3")
    argv = ("--checkpoint", checkpoint, "--in", tmp_path / "user.mp3", "--out", tmp_path / "reply.wav", "--json")
    status, printed, _ = jaxtml("converse", *argv)
    assert status == 0
    assert abs(json.loads(printed)["seconds"] - 1.0) < 0.1


def bad_recordings(folder: Path) -> dict[str, tuple[Path, str]]:
    """Makes files that are no recording of a user. Returns each path with what the message has to contain."""
    (folder / "text.wav").write_text("not sound")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(folder / "nan.wav", np.full(8 * SAMPLE_RATE, np.nan, np.float32), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(800), SAMPLE_RATE)
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
def test_converse_refuses_a_bad_recording_and_writes_nothing(refusal, checkpoint, tmp_path, kind):
    path, message = bad_recordings(tmp_path)[kind]
    out = tmp_path / "reply.wav"
    assert message in refusal("converse", "--checkpoint", checkpoint, "--in", path, "--out", out)
    assert not out.exists()


def test_converse_refuses_bad_checkpoints_folders_and_video(refusal, checkpoint, recording, tmp_path):
    out = tmp_path / "reply.wav"
    missing_directory = ("converse", "--in", recording, "--out", out, "--checkpoint", tmp_path / "nowhere")
    assert "no checkpoint directory" in refusal(*missing_directory)
    (tmp_path / "empty").mkdir()
    no_checkpoint = ("converse", "--in", recording, "--out", out, "--checkpoint", tmp_path / "empty")
    assert "has no config.json, so it is no checkpoint: it is empty" in refusal(*no_checkpoint)
    no_folder = ("converse", "--checkpoint", checkpoint, "--in", recording, "--out", tmp_path / "no" / "reply.wav")
    assert "there is no folder" in refusal(*no_folder)
    video = ("converse", "--checkpoint", checkpoint, "--in", recording, "--out", out, "--video", recording)
    assert "holds no video" in refusal(*video)
    assert not out.exists()


def test_converse_refuses_a_checkpoint_whose_sizes_are_not_those_of_its_config(
    refusal, checkpoint, recording, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["backbone"]["d_ff_dense"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    argv = ("converse", "--checkpoint", other, "--in", recording, "--out", tmp_path / "reply.wav")
    assert "does not have the sizes of its config.json" in refusal(*argv)
