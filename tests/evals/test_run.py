"""An evaluation holds every session once, goes on where it was, and refuses a folder of another model."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.evals import report, run
from jaxtml.evals import thresholds as bars
from jaxtml.evals.material import EvaluationTalk
from jaxtml.stream.audio_file import read_audio

SLOTS = 4  # as many as the step that all tests share is compiled for
SETTING = run.Setting("model", {"seed": 1}, "listener")


@dataclass
class Listener:
    """Understands everything as "the"; counts what it was asked."""

    asked: int = 0

    def hear(self, wave: np.ndarray) -> str:
        assert len(wave)
        self.asked += 1
        return "the"


@pytest.fixture
def items(talk):
    """Eleven sessions of 10 micro-turns in two sets, one of them with a turn."""

    def made(number):
        made = talk(number, 10)
        return replace(made, user_words=made.user_words[:1], scenario="exchange" if made.user_words else "silence",
                       expected="hello" if made.user_words else "",
                       user_end_s=tuple(word.end_s for word in made.user_words[:1]))  # fmt: skip

    sets = ["synthetic"] * 9 + ["human"] * 2
    return [EvaluationTalk(f"{name}-{n:04}", name, "v", lambda n=n: made(n)) for n, name in enumerate(sets)]


def test_a_killed_evaluation_goes_on_to_the_same_records(engine, items, tmp_path):
    whole = run.hold(engine, items, tmp_path / "whole", SETTING, None, 0, batch=SLOTS)
    lines = (tmp_path / "whole" / run.ITEMS).read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [item.id for item in items]

    killed = tmp_path / "killed"
    run.hold(engine, items[:8], killed, SETTING, None, 0, batch=SLOTS)
    (killed / run.ITEMS).write_text("".join([*lines[:6], lines[6][:40]]))  # killed while it wrote
    again = run.hold(engine, items, killed, SETTING, None, 0, batch=SLOTS)

    def timeless(sessions):
        return [replace(session, step_ms=0.0) for session in sessions]

    assert timeless(again) == timeless(whole)
    assert len((killed / run.ITEMS).read_text().splitlines()) == len(items)
    assert bars.score(again)["rows"] == bars.score(whole)["rows"]


def test_a_finished_evaluation_is_not_held_again(engine, items, tmp_path):
    run.hold(engine, items[:3], tmp_path, SETTING, None, 0, batch=SLOTS)
    before = (tmp_path / run.ITEMS).read_bytes()
    run.hold(None, items[:3], tmp_path, SETTING, None, 0, batch=SLOTS)
    assert (tmp_path / run.ITEMS).read_bytes() == before


def test_a_folder_of_another_model_is_refused(engine, items, tmp_path):
    run.hold(engine, items[:1], tmp_path, SETTING, None, 0, batch=SLOTS)
    with pytest.raises(InputError, match="another model"):
        run.hold(engine, items[:1], tmp_path, replace(SETTING, model="other"), None, 0, batch=SLOTS)


def test_the_digest_is_of_the_parameters(engine):
    assert run.digest_of(engine) == run.digest_of(engine)
    changed = replace(engine, params={**engine.params, "own": engine.params["own"] + 1})
    assert run.digest_of(changed) != run.digest_of(engine)


def test_the_listener_is_asked_no_more_than_it_may_be(engine, items, tmp_path):
    listener = Listener()
    sessions = run.hold(engine, items, tmp_path, SETTING, listener, 2, batch=SLOTS)
    asked = [sum(s.understood is not None for t in sessions if t.set == name for s in t.stretches)
             for name in ("synthetic", "human")]  # fmt: skip
    assert listener.asked == sum(asked) > 0
    assert max(asked) <= 2


def test_a_reply_can_be_listened_to_beside_what_it_answers(engine, items, tmp_path):
    run.hold(engine, items, tmp_path, SETTING, None, 0, batch=SLOTS)
    assert {path.name for path in (tmp_path / "wavs").iterdir()} == {f"synthetic-000{n}.wav" for n in range(4)}
    assert len(read_audio(tmp_path / "wavs" / "synthetic-0001.wav")) == len(items[1].make().user)


def test_the_report_shows_every_figure_and_a_picture(engine, items, tmp_path):
    sessions = run.hold(engine, items, tmp_path, SETTING, None, 0, batch=SLOTS)
    score = json.loads(json.dumps(bars.score(sessions)))
    assert report.table_of(score["rows"]).row_count == len(score["rows"]) == 34
    assert report.breakdown_table("x", score["sets"]["synthetic"]["intents"]).row_count >= 1
    report.picture(tmp_path / "summary.png", sessions, score, "title")
    assert (tmp_path / "summary.png").stat().st_size > 10_000
