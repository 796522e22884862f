"""Tests of access: keys, short-lived keys and quotas."""

from __future__ import annotations

import hashlib
import json

import pytest

from jaxtml.errors import InputError
from jaxtml.serve.protocols.registry import PROTOCOLS
from jaxtml.serve.sessions.access import EVERYONE, Access, Key
from jaxtml.serve.sessions.errors import Refused


class Clock:
    """A clock in Unix time that a test sets."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


def refusal(*arguments, of) -> str:
    """Calls the function `of` with the arguments, checks that it refuses them, and returns the code of its error."""
    with pytest.raises(Refused) as error:
        of(*arguments)
    return error.value.code


def test_key_is_known_by_itself_or_by_its_digest_and_the_digest_is_no_key():
    digest = "sha256:" + hashlib.sha256(b"sk-hidden-key").hexdigest()
    access = Access([Key(name="plain", key="sk-plain-key"), Key(name="hidden", key=digest)])
    assert access.authenticate("sk-plain-key").key.name == "plain"
    assert access.authenticate("sk-hidden-key").key.name == "hidden"
    assert refusal(digest, of=access.authenticate) == "invalid_api_key"
    assert refusal("", of=access.authenticate) == refusal(None, of=access.authenticate) == "missing_api_key"


def test_without_keys_everyone_may_do_everything():
    access = Access()
    assert access.authenticate(None).key is EVERYONE and access.authenticate("anything").key is EVERYONE
    for n in range(1000):
        access.count_request(access.authenticate(None))
        access.begin_session(access.authenticate(None), f"s{n}", "live")


def test_short_lived_key_has_its_makers_scopes_and_expires():
    clock = Clock()
    maker = Key(name="maker", key="sk-maker-key", scopes=("live", "realtime"))
    access = Access([maker], "s" * 32, clock)
    value = access.create_short_lived_key(
        access.authenticate("sk-maker-key"), int(clock.time) + 60, ("realtime", "moshi"), {"a": 1}
    )
    grant = access.authenticate(value)
    assert (grant.key, grant.scopes, grant.session) == (maker, {"realtime"}, {"a": 1})
    assert refusal(grant, "s1", "live", of=access.begin_session) == "insufficient_scope"
    access.begin_session(grant, "s1", "realtime")
    replica = Access([maker], "s" * 32, clock)
    assert replica.authenticate(value).key == maker, "a server with the same file accepts it"
    for other in (Access([maker], "t" * 32, clock), Access([maker], "", clock)):
        assert refusal(value, of=other.authenticate) == "invalid_api_key"
    assert refusal(value[:-3] + "abc", of=access.authenticate) == "invalid_api_key"
    assert refusal("ek_nonsense", of=access.authenticate) == "invalid_api_key"
    without = Access([Key(name="other", key="sk-other-key")], "s" * 32, clock)
    assert refusal(value, of=without.authenticate) == "invalid_api_key", "its maker is no longer in the file"
    clock.time += 61
    assert refusal(access.authenticate(value), of=access.count_request) == "expired_api_key"


def test_requests_sessions_and_minutes_are_counted_per_key():
    clock = Clock()
    key = Key(name="one", key="sk-first-key", sessions=2, minutes_per_day=10, requests_per_minute=3)
    access = Access([key, Key(name="two", key="sk-second-key")], now=clock)
    grant = access.authenticate("sk-first-key")
    for _ in range(3):
        access.count_request(grant)
        clock.time += 10
    with pytest.raises(Refused) as error:
        access.count_request(grant)
    assert error.value.code == "rate_limit_exceeded" and error.value.retry_after_s == pytest.approx(30)
    clock.time += 31
    access.count_request(grant)
    access.begin_session(grant, "a", "live")
    access.begin_session(grant, "b", "live")
    assert refusal(grant, "c", "live", of=access.begin_session) == "session_limit_exceeded"
    access.begin_session(access.authenticate("sk-second-key"), "d", "live")
    clock.time += 240
    assert access.minutes_used("one") == pytest.approx(8)
    access.end_session("one", "a")
    access.end_session("one", "a")  # a second time counts nothing
    access.end_session("one", "b")
    access.begin_session(grant, "e", "live")
    clock.time += 180
    access.end_session("one", "e")
    with pytest.raises(Refused) as error:
        access.begin_session(grant, "f", "live")
    assert error.value.code == "quota_exceeded" and 0 < error.value.retry_after_s <= 86_400
    clock.time += 86_400
    access.begin_session(grant, "f", "live")
    assert access.minutes_used("one") == 0 and access.remaining_s(grant) == pytest.approx(600)


def test_thousands_of_short_sessions_take_no_memory():
    clock = Clock()
    access = Access([Key(name="one", key="sk-first-key")], now=clock)
    grant = access.authenticate("sk-first-key")
    for n in range(5000):
        access.begin_session(grant, str(n), "live")
        clock.time += 0.1
        access.end_session("one", str(n))
    assert len(access._used["one"]) < 12 and access.minutes_used("one") == pytest.approx(500 / 60)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"keys": []}',
        '{"keys": [{"name": "a", "key": "short"}]}',
        '{"keys": [{"name": "", "key": "sk-long-enough"}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough", "scopes": ["all"]}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough", "colour": 1}]}',
        '{"keys": [{"name": "a", "key": "sk-long/enough"}]}',
        '{"keys": [{"name": "a", "key": "sha256:sk-long-enough"}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough", "sessions": 0}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough", "minutes_per_day": -1}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough", "requests_per_minute": 0}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough"}, {"name": "a", "key": "sk-another-one"}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough"}, {"name": "b", "key": "sk-long-enough"}]}',
        '{"keys": [{"name": "a", "key": "sk-long-enough"}], "secret": "short"}',
    ],
)
def test_wrong_file_of_keys_is_refused_without_quoting_a_key(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(InputError) as error:
        Access.load(tmp_path / "keys.json", PROTOCOLS)
    assert "sk-" not in str(error.value) and "keys.json" in str(error.value)


def test_a_file_that_is_no_json_is_called_so_and_the_format_is_named(tmp_path):
    path = tmp_path / "keys.json"
    for text, problem in (("", "not valid JSON"), ('{"keys": [', "not valid JSON"), ("[]", "must be an object")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"{problem}.*; docs/serving.md, section Keys and quotas, has an example"):
            Access.load(path, PROTOCOLS)
    with pytest.raises(InputError, match="No such file or directory; name a file of keys"):
        Access.load(tmp_path / "none.json", PROTOCOLS)


def test_file_of_keys_is_read(tmp_path):
    with pytest.raises(InputError, match="no keys in"):
        Access.load(tmp_path / "missing.json", PROTOCOLS)
    keys = [{"name": "a", "key": "sk-long-enough", "sessions": 3}]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys, "secret": "s" * 32}))
    assert Access.load(tmp_path / "keys.json", PROTOCOLS).authenticate("sk-long-enough").key.sessions == 3


def test_used_minutes_and_short_lived_keys_stay_when_keys_are_replaced():
    clock = Clock()
    old = Access([Key(name="a", key="sk-first-key", minutes_per_day=10), Key(name="b", key="sk-second-key")], now=clock)
    grant, gone = old.authenticate("sk-first-key"), old.authenticate("sk-second-key")
    short = old.create_short_lived_key(grant, int(clock.time) + 600, ["live"], None)
    old.begin_session(grant, "sess_1", "live")
    old.begin_session(gone, "sess_2", "live")
    clock.time += 300
    digest = "sha256:" + hashlib.sha256(b"sk-new-key").hexdigest().upper()
    old.replace_keys(
        Access([Key(name="a", key=digest, sessions=1, minutes_per_day=10), Key(name="c", key="sk-third-key")])
    )
    assert refusal("sk-first-key", of=old.authenticate) == refusal("sk-second-key", of=old.authenticate)
    renewed = old.authenticate("sk-new-key")
    assert old.minutes_used("a") == 5 and refusal(renewed, "live", of=old.check_session) == "session_limit_exceeded"
    assert old.authenticate(short).key == renewed.key
    assert old.remaining_s(gone) == float("inf")
    for name, session in (("a", "sess_1"), ("b", "sess_2")):
        old.end_session(name, session)
    old.begin_session(renewed, "sess_3", "live")
    old.replace_keys(Access([Key(name="a", key="sk-first-key")], secret="s" * 32))
    assert refusal(short, of=old.authenticate) == "invalid_api_key", "another secret"
