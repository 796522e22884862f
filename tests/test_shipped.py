"""What the package ships: weights that load with today's config, take at most 25 MB and answer the demo recording."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.commands.main import run
from jaxtml.evals.observation import AUDIBLE_RMS

HUMAN = SHIPPED.parent / "demo" / "human.flac"


def test_the_weights_and_their_logs_fit_the_limit():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert 10e6 < sum(path.stat().st_size for path in files) <= 25e6
    steps = [json.loads(line)["step"] for line in (SHIPPED / "training.jsonl").read_text().splitlines()]
    assert len(steps) > 100 and (SHIPPED / "vocoder_training.jsonl").is_file()


def test_a_person_is_answered_by_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run(["jaxtml", "converse", "--in", str(HUMAN), "--out", str(tmp_path / "reply.wav"), "--json"])
    assert not ended.value.code
    summary = json.loads(capsys.readouterr().out)
    assert summary["replies"] >= 2, summary
    reply, rate = soundfile.read(tmp_path / "reply.wav", dtype="float32")
    assert rate == 16000 and len(reply) == round(soundfile.info(HUMAN).duration * 16000)
    assert np.sqrt(np.mean(np.square(reply))) > AUDIBLE_RMS
