"""Sessions keep the timing rules: who may speak when, and who stops."""

import numpy as np
import pytest
from tones import ToneBank

from jaxtml.data.talks import channel, mix
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.data.tasks.scenarios import incomplete_after, is_complete, is_nonsense, reply_to
from jaxtml.errors import InputError
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

ONLY = {
    "exchange": ScenarioWeights(exchange=1, hesitation=0, barge_in=0, distraction=0, silence=0, typed=0),
    "hesitation": ScenarioWeights(exchange=0, hesitation=1, barge_in=0, distraction=0, silence=0, typed=0, joined=0),
    "barge_in": ScenarioWeights(exchange=0.2, hesitation=0, barge_in=0.8, distraction=0, silence=0, typed=0),
    "distraction": ScenarioWeights(exchange=0.5, hesitation=0, barge_in=0, distraction=0.5, silence=0, typed=0),
    "silence": ScenarioWeights(silence=1.0),
    "typed": ScenarioWeights(silence=0, typed=1.0),
    "all": ScenarioWeights(),
}


@pytest.fixture(scope="module")
def speakers() -> Speakers:
    return Speakers.of(ToneBank.made())


def sessions(speakers, name, count=25, **options):
    options = {"channel": channel.CLEAN, **options}
    return [mix.make_conversation(np.random.default_rng((7, i)), speakers, ONLY[name], **options) for i in range(count)]


def sounding(wave: np.ndarray) -> np.ndarray:
    """Returns the indices of the samples at which something is heard."""
    return np.flatnonzero(np.abs(wave) > 1e-4)


@pytest.mark.parametrize("name", list(ONLY))
def test_both_channels_share_one_clock_of_whole_micro_turns(speakers, name):
    for talk in sessions(speakers, name, 5, micro_turns=61, channel=None):
        assert talk.user.shape == talk.assistant.shape == (61 * MICRO_TURN_SAMPLES,)
        assert talk.user.dtype == talk.assistant.dtype == np.float32
        assert np.abs(talk.user).max() <= 1


def test_the_reply_is_heard_200_to_400_ms_after_the_users_end(speakers):
    talks = sessions(speakers, "exchange")
    latencies = []
    for talk in talks:
        assert len(talk.user_end_s) == len(talk.speech)
        for end_s, speech in zip(talk.user_end_s, talk.speech, strict=True):
            latencies.append((speech.start_micro_turn + 1) * MICRO_TURN_SAMPLES / SAMPLE_RATE - end_s)
            heard = sounding(talk.user[: round(end_s * SAMPLE_RATE)])
            assert len(talk.user) and round(end_s * SAMPLE_RATE) - heard[-1] < 400, "the end is the end of the sound"
    assert len(latencies) > 60
    assert min(latencies) >= 0.2
    assert max(latencies) <= 0.4
    assert np.std(latencies) > 0.03, "users end anywhere inside a micro-turn"


@pytest.mark.parametrize("name", list(ONLY))
def test_the_assistant_is_heard_only_inside_its_stretches(speakers, name):
    for talk in sessions(speakers, name, 10):
        spoken = np.zeros(len(talk.assistant), bool)
        last = -1
        for speech in talk.speech:
            start, end = speech.start_micro_turn, speech.end_micro_turn
            assert last < start < end, "stretches are in order, with a micro-turn that listens between them"
            last = end
            spoken[(start + 1) * MICRO_TURN_SAMPLES : (end + 1) * MICRO_TURN_SAMPLES] = True
            for word in speech.words:
                assert spoken[int(word.start_s * SAMPLE_RATE)] and spoken[int(word.end_s * SAMPLE_RATE) - 1]
        assert spoken[sounding(talk.assistant)].all()


def test_every_reply_is_right_for_what_the_user_said(speakers):
    checked = 0
    for talk in sessions(speakers, "all"):
        start_s = 0.0
        for end_s, expected in zip(talk.user_end_s, talk.expected.split(" | "), strict=False):
            heard = [
                word.text for word in talk.user_words if start_s - 1e-6 <= word.start_s and word.end_s <= end_s + 1e-6
            ]
            assert is_complete(heard) or is_nonsense(heard)
            assert reply_to(heard) == expected
            start_s, checked = end_s, checked + 1
    assert checked > 60


def test_the_assistant_stays_silent_in_a_pause_inside_a_sentence(speakers):
    pauses = []
    for talk in sessions(speakers, "hesitation"):
        for before, after in zip(talk.user_words, talk.user_words[1:], strict=False):
            is_inside_a_turn = not any(before.end_s - 0.01 <= end <= after.start_s for end in talk.user_end_s)
            if is_inside_a_turn and after.start_s - before.end_s > 0.38:
                pauses.append(after.start_s - before.end_s)
                window = slice(int(before.end_s * SAMPLE_RATE), int(after.start_s * SAMPLE_RATE))
                assert np.abs(talk.assistant[window]).max() == 0
                k = talk.user_words.index(before)
                first = k - next(n for n in range(k + 1) if n == k or _ends_turn(talk, k - n - 1))
                sentence = [
                    word.text for word in talk.user_words[first:] if word.end_s <= _end_after(talk, after) + 1e-6
                ]
                assert incomplete_after(sentence, k - first + 1)
    assert len(pauses) > 30
    assert max(pauses) < 1.75


def _ends_turn(talk, k: int) -> bool:
    return any(abs(talk.user_words[k].end_s - end) < 0.02 for end in talk.user_end_s)


def _end_after(talk, word) -> float:
    return min(end for end in talk.user_end_s if end >= word.end_s - 1e-6)


def test_an_interrupted_assistant_has_stopped_within_400_ms_and_then_answers(speakers):
    interrupted = 0
    for talk in sessions(speakers, "barge_in"):
        for n, scenario in enumerate(talk.scenario.split()):
            if scenario != "barge_in":
                continue
            interrupted += 1
            before, after = talk.speech[n - 1], talk.speech[n]
            start_s = min(w.start_s for w in talk.user_words if talk.user_end_s[n - 1] < w.start_s)
            stop = (before.end_micro_turn + 1) * MICRO_TURN_SAMPLES
            # The start of the user's clip decides the micro-turn. The clip starts up to 10 ms before its first word.
            assert 0.19 <= stop / SAMPLE_RATE - start_s <= 0.4
            assert (before.start_micro_turn + 1) * MICRO_TURN_SAMPLES < start_s * SAMPLE_RATE, "it was speaking"
            assert np.abs(talk.assistant[stop : (after.start_micro_turn + 1) * MICRO_TURN_SAMPLES]).max() == 0
            assert np.abs(talk.assistant[stop - 8 : stop]).max() < 0.02, "it fades, it does not click"
            assert " ".join(word.text for word in before.words) != talk.expected.split(" | ")[n - 1]
    assert interrupted > 20


def test_an_interrupted_stretch_keeps_only_words_that_were_said_to_their_end(speakers):
    for talk in sessions(speakers, "barge_in"):
        for speech, reply in zip(talk.speech, talk.expected.split(" | "), strict=True):
            said = [word.text for word in speech.words]
            assert said == reply.split()[: len(said)]
            end = (speech.end_micro_turn + 1) * MICRO_TURN_SAMPLES
            assert all(word.end_s * SAMPLE_RATE <= end for word in speech.words)
            assert [*said, *(word.text for word in speech.unsaid)] == reply.split()


def test_typed_text_is_answered_in_the_micro_turn_in_which_it_is_known(speakers):
    replies = set()
    for talk in sessions(speakers, "typed"):
        assert talk.user_words == () and talk.user_end_s == ()
        assert [micro_turn for micro_turn, _ in talk.typed] == [speech.start_micro_turn for speech in talk.speech]
        expected = [reply_to(text.split()) for _, text in talk.typed]
        assert expected == [" ".join(word.text for word in speech.words) for speech in talk.speech]
        assert talk.expected == " | ".join(expected)
        replies.update(expected)
        spoken = sum(speech.end_micro_turn - speech.start_micro_turn for speech in talk.speech)
        assert spoken > 0.5 * len(talk.user) / MICRO_TURN_SAMPLES, "most of the session is the model's own voice"
    assert len(replies) > 100


def test_nobody_is_answered_when_nobody_spoke(speakers):
    talks = sessions(speakers, "silence", channel=None)
    assert any(np.abs(talk.user).max() > 1e-3 for talk in talks), "noise and coughs are there"
    for talk in talks:
        assert talk.speech == () and talk.user_words == () and talk.expected == ""
        assert np.abs(talk.assistant).max() == 0


def test_coughs_do_not_stop_the_assistant(speakers):
    for talk in sessions(speakers, "distraction"):
        for speech, reply in zip(talk.speech, talk.expected.split(" | "), strict=False):
            assert [word.text for word in speech.words] == reply.split()


def test_sessions_repeat_with_their_seed_and_differ_otherwise(speakers):
    first, same, other = (mix.make_conversation(np.random.default_rng(seed), speakers) for seed in (3, 3, 4))
    assert first.user.tobytes() == same.user.tobytes() and first.user_words == same.user_words
    assert first.clock_s == same.clock_s and first.scenario == same.scenario
    assert first.user.tobytes() != other.user.tobytes()


def test_words_joined_from_different_utterances_make_new_sentences(speakers):
    joined = ScenarioWeights(1, 0, 0, 0, 0, typed=0, joined=1.0)
    talks = [
        mix.make_conversation(np.random.default_rng(i), speakers, joined, channel=channel.CLEAN) for i in range(20)
    ]
    replies = {reply for talk in talks for reply in talk.expected.split(" | ")}
    spoken = {reply_to(speakers.clip(int(i)).text.split()) for i in speakers.users}
    assert len(replies - spoken) >= 5


def test_words_that_are_no_sentence_are_answered_and_have_no_pause(speakers):
    all_nonsense = ScenarioWeights(0.5, 0.5, 0, 0, 0, typed=0, joined=1.0, nonsense=1.0)
    seen = 0
    for i in range(8):
        talk = mix.make_conversation(np.random.default_rng((3, i)), speakers, all_nonsense, channel=channel.CLEAN)
        replies = filter(None, talk.expected.split(" | "))
        for scenario, expected in zip(talk.scenario.split(), replies, strict=True):
            seen += expected == "i see"
            assert (scenario, expected) != ("hesitation", "i see")
    assert seen >= 8


def test_a_bank_without_users_is_refused():
    with pytest.raises(InputError, match="no user voices"):
        Speakers.of(ToneBank((), ()))


LINES = (
    "nobody knows the way home any more", "you like what i have now", "the good one is mine",
    "hello my good friend", "what is it that you say",
)  # fmt: skip


@pytest.fixture(scope="module")
def overhearing() -> Speakers:
    return Speakers.of(ToneBank.made(LINES))


def only(**weights: float) -> ScenarioWeights:
    odds = dict.fromkeys(("exchange", "hesitation", "barge_in", "distraction", "aside", "side_talk"), 0.0)
    return ScenarioWeights(**(odds | {"silence": 0.0, "typed": 0.0} | weights))


def test_a_line_that_could_be_answered_is_not_overheard(overhearing):
    lines = [overhearing.clip(i).text for i in overhearing.lines["human:tone"].tolist()]
    assert lines == [line for line in LINES if not line.startswith("hello")]


def test_what_is_said_to_somebody_else_is_transcribed_and_not_answered(overhearing):
    asides = 0
    for seed in range(20):
        weights = only(exchange=0.5, aside=0.5)
        talk = mix.make_conversation(np.random.default_rng(seed), overhearing, weights, channel=channel.CLEAN)
        names = talk.scenario.split()
        assert len(talk.speech) == len(talk.user_end_s) == names.count("exchange")
        words = " ".join(word.text for word in talk.user_words)
        assert sum(words.count(line) for line in LINES[:3] + LINES[4:]) == names.count("aside")
        starts = [word.start_s for word in talk.user_words]
        assert starts == sorted(starts)
        for speech in talk.speech:  # nobody speaks while the assistant does
            heard = [(speech.start_micro_turn + 1) * 0.2, (speech.end_micro_turn + 1) * 0.2 - 0.2]
            assert not any(heard[0] < word.start_s < heard[1] for word in talk.user_words)
        asides += names.count("aside")
    assert asides > 20


def test_people_talk_to_each_other_in_a_session_without_a_user(overhearing):
    weights = only(silence=1.0, overheard=1.0)
    talk = mix.make_conversation(np.random.default_rng(0), overhearing, weights, channel=channel.CLEAN)
    assert talk.scenario.split()[:3] == ["silence", "aside", "aside"]
    assert talk.user_words and not talk.speech and not talk.user_end_s and not talk.expected


def test_side_talk_is_soft_and_leaves_words_and_replies_as_they_are(overhearing):
    weights = only(exchange=0.5, side_talk=0.5)
    during = 0
    for seed in range(20):
        talk = mix.make_conversation(np.random.default_rng(seed), overhearing, weights, channel=channel.CLEAN)
        assert len(talk.user_end_s) == len(talk.speech) == talk.scenario.split().count("exchange")
        assert all(not speech.unsaid for speech in talk.speech)
        for speech in talk.speech:
            first = (speech.start_micro_turn + 1) * MICRO_TURN_SAMPLES
            heard = talk.user[first + MICRO_TURN_SAMPLES : (speech.end_micro_turn + 1) * MICRO_TURN_SAMPLES]
            if len(heard) and np.abs(heard).max() > 1e-3:
                during += 1
                assert np.sqrt(np.mean(heard**2)) < 10 ** (-26 / 20) * 10 ** (-12 / 20)
    assert during > 3


def test_a_recorded_person_says_user_turns_made_of_the_words_of_their_lines(overhearing):
    said = set(" ".join(LINES).split())
    assert set(overhearing.texts["human:tone"]) == {"hello", "say one"}
    weights = only(exchange=1.0, engines=(("human", 1.0),))
    talk = mix.make_conversation(np.random.default_rng(2), overhearing, weights, channel=channel.CLEAN)
    assert talk.user_words and {word.text for word in talk.user_words} <= said
    assert set(talk.expected.split(" | ")) <= {"i see", "hello", "one"}


def test_a_bank_without_recordings_has_no_asides(speakers):
    talk = mix.make_conversation(np.random.default_rng(0), speakers, ScenarioWeights(typed=0, silence=0))
    assert not {"aside", "side_talk"} & set(talk.scenario.split())
