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


def test_converse_reads_standard_input_and_writes_what_the_names_promise(jaxtml, checkpoint, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "u.mp3", 0.1 * np.random.default_rng(1).standard_normal((48_000, 2)), 48_000)
    files = ("--events", tmp_path / "e.json", "--stereo", tmp_path / "s.mp3", "--picture", tmp_path / "t.svg")
    argv = ("converse", "--checkpoint", checkpoint, "--in", "-", "--out", tmp_path / "r.flac", *files, "--json")
    with open(tmp_path / "u.mp3") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        status, printed, _ = jaxtml(*argv)
    assert status == 0 and json.loads(printed)["seconds"] == 1.0
    assert [soundfile.info(tmp_path / name).format for name in ("r.flac", "s.mp3")] == ["FLAC", "MP3"]
    assert [event["t_ms"] for event in json.loads((tmp_path / "e.json").read_text())] == [0, 200, 400, 600, 800]
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


BAD_OPTIONS = {
    "sound": (("--out", "r.m4a"), "r.m4a: cannot be written as 'm4a'; let its name end in .wav, .flac, .ogg"),
    "stereo": (("--out", "r.wav", "--stereo", "s.aac"), "s.aac: cannot be written as 'aac'"),
    "picture": (
        ("--out", "r.wav", "--picture", "t.bmp"),
        "cannot be written as 'bmp'; let its name end in .png",
    ),
    "events": (
        ("--out", "r.wav", "--events", "e.csv"),
        "cannot be written as 'csv'; let its name end in .jsonl",
    ),
    "stdout": (("--out", "-"), "cannot write -"),
    "no name": (("--out", ""), "the name is empty"),
    "seed": (("--out", "r.wav", "--seed", "-1"), "--seed: -1: give a number from 0 to 4294967295"),
    "video": (("--out", "r.wav", "--video", "none.mp4"), "no video file none.mp4: give"),
    "piped video": (("--out", "r.wav", "--video", "-"), "a video cannot come through a pipe"),
    "mesh": (("--out", "r.wav", "--mesh", "experts=2"), "there is no axis 'experts'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_converse_checks_every_option_before_it_loads_the_model(refusal, recording, tmp_path, monkeypatch, case):
    options, message = BAD_OPTIONS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxtml.session.engine.Engine.load", lambda *_: pytest.fail("the model was loaded"))
    assert message in refusal("converse", "--in", recording, *options)
    assert not list(tmp_path.iterdir())
