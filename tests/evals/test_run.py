"""An evaluation runs every session once, resumes where it was, and refuses a folder of another model."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.evals import report, run
from jaxtml.evals.material import EvaluationTalk
from jaxtml.evals.scores import score
from jaxtml.stream.audio_file import read_audio

SLOTS = 4  # of the compiled step that all tests share
SETTINGS = run.EvaluationSettings("model", {"seed": 1}, "judge")


@dataclass
class FakeJudge:
    """Understands everything as "the", and counts how often it was asked."""

    asked: int = 0

    def transcribe(self, wave: np.ndarray) -> str:
        assert len(wave)
        self.asked += 1
        return "the"


@pytest.fixture
def talks(talk):
    """Eleven sessions of 10 micro-turns in two sets, with at most one user turn each."""

    def made(number):
        made = talk(number, 10)
        return replace(made, user_words=made.user_words[:1], scenario="exchange" if made.user_words else "silence",
                       expected="hello" if made.user_words else "",
                       user_end_s=tuple(word.end_s for word in made.user_words[:1]))  # fmt: skip

    sets = ["synthetic"] * 9 + ["human"] * 2
    return [EvaluationTalk(f"{name}-{n:04}", name, "v", lambda n=n: made(n)) for n, name in enumerate(sets)]


def test_a_killed_evaluation_resumes_to_the_same_records(engine, talks, tmp_path):
    uninterrupted = run.hold_sessions(engine, talks, tmp_path / "uninterrupted", SETTINGS, None, 0, batch=SLOTS)
    lines = (tmp_path / "uninterrupted" / run.RECORDS).read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [talk.id for talk in talks]

    killed = tmp_path / "killed"
    run.hold_sessions(engine, talks[:8], killed, SETTINGS, None, 0, batch=SLOTS)
    (killed / run.RECORDS).write_text("".join([*lines[:6], lines[6][:40]]))  # killed while it wrote
    resumed = run.hold_sessions(engine, talks, killed, SETTINGS, None, 0, batch=SLOTS)

    def timeless(sessions):
        return [replace(session, step_ms=0.0) for session in sessions]

    assert timeless(resumed) == timeless(uninterrupted)
    assert len((killed / run.RECORDS).read_text().splitlines()) == len(talks)
    assert score(resumed)["rows"] == score(uninterrupted)["rows"]


def test_a_finished_evaluation_is_not_run_again(engine, talks, tmp_path):
    run.hold_sessions(engine, talks[:3], tmp_path, SETTINGS, None, 0, batch=SLOTS)
    before = (tmp_path / run.RECORDS).read_bytes()
    run.hold_sessions(None, talks[:3], tmp_path, SETTINGS, None, 0, batch=SLOTS)
    assert (tmp_path / run.RECORDS).read_bytes() == before


def test_a_folder_of_another_model_is_refused(engine, talks, tmp_path):
    run.hold_sessions(engine, talks[:1], tmp_path, SETTINGS, None, 0, batch=SLOTS)
    with pytest.raises(InputError, match="another model"):
        run.hold_sessions(engine, talks[:1], tmp_path, replace(SETTINGS, model="other"), None, 0, batch=SLOTS)


def test_the_digest_is_of_the_parameters(engine):
    assert run.parameter_digest(engine) == run.parameter_digest(engine)
    changed = replace(engine, params={**engine.params, "own": engine.params["own"] + 1})
    assert run.parameter_digest(changed) != run.parameter_digest(engine)


def test_the_judge_transcribes_no_more_than_it_may(engine, talks, tmp_path):
    judge = FakeJudge()
    sessions = run.hold_sessions(engine, talks, tmp_path, SETTINGS, judge, 2, batch=SLOTS)
    asked = [sum(s.understood is not None for t in sessions if t.set == name for s in t.stretches)
             for name in ("synthetic", "human")]  # fmt: skip
    assert judge.asked == sum(asked) > 0
    assert max(asked) <= 2


def test_the_first_sessions_of_a_set_can_be_listened_to(engine, talks, tmp_path):
    run.hold_sessions(engine, talks, tmp_path, SETTINGS, None, 0, batch=SLOTS)
    assert {path.name for path in (tmp_path / "wavs").iterdir()} == {f"synthetic-000{n}.wav" for n in range(4)}
    assert len(read_audio(tmp_path / "wavs" / "synthetic-0001.wav")) == len(talks[1].make().user)


def test_the_report_shows_every_metric_and_a_picture(engine, talks, tmp_path):
    sessions = run.hold_sessions(engine, talks, tmp_path, SETTINGS, None, 0, batch=SLOTS)
    scores = json.loads(json.dumps(score(sessions)))
    assert report.metrics_table(scores["rows"]).row_count == len(scores["rows"]) == 34
    assert report.breakdown_table("x", scores["sets"]["synthetic"]["intents"]).row_count >= 1
    report.save_picture(tmp_path / "summary.png", sessions, scores, "title")
    assert (tmp_path / "summary.png").stat().st_size > 10_000
