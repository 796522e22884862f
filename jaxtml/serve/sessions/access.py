"""Who may use a server, and how much: keys from a file, short-lived ones made from them, quotas. Knows of no network.

The file is JSON: `{"secret": "...", "keys": [{"name": "team-a", "key": "sk-...", "sessions": 8}]}`. A key stands there
itself or as `sha256:` and the hex digest of it. Short-lived keys are JSON Web Tokens (RFC 7519) signed with the secret,
so that every replica that has the file knows them; without a secret, only the server that made one does. Without a
file, everyone may do everything: `jaxtml serve` does that on the machine's own loopback alone.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import jwt
import msgspec

from jaxtml.errors import InputError
from jaxtml.serve.sessions.errors import Refused

PREFIX = "ek_"  # of short-lived keys, as OpenAI's have it
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MINUTE_S, _DAY_S = 60.0, 86_400.0


class Key(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What the holder of a key may do.

    Attributes:
      name: stands in logs, the key never does.
      key: itself, or `sha256:` and its digest.
      sessions: at a time.
      minutes_per_day: of sessions, in the last 24 hours.
      requests_per_minute: for sessions, for places beside them, and for short-lived keys.
      scopes: names of the protocols that the key may use; None: all protocols.
    """

    name: str
    key: str = ""
    sessions: int = 1_000_000
    minutes_per_day: float = float("inf")
    requests_per_minute: int = 1_000_000
    scopes: tuple[str, ...] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: tuple[Key, ...]
    secret: str = ""


class Grant(msgspec.Struct, frozen=True):
    """What someone who asks is known as. `session` is what a short-lived key fixes of the session.

    `scopes` are the names of the protocols that the client may use; None: all protocols.
    """

    key: Key
    scopes: frozenset[str] | None
    session: dict[str, Any] | None = None
    expired: bool = False  # nothing begins any more; what was begun goes on


EVERYONE = Key(name="everyone")


class Access:
    """The keys of a server and what they have used; one thread calls.

    Args:
      keys: empty: everyone may do everything.
      secret: signs short-lived keys; empty: a random one.
      now: seconds since the epoch.
    """

    def __init__(self, keys: Iterable[Key] = (), secret: str = "", now: Callable[[], float] = time.time):
        self.keys = {
            key.key.removeprefix("sha256:") if key.key.startswith("sha256:") else _digest(key.key): key for key in keys
        }
        self.names = {key.name: key for key in self.keys.values()} or {EVERYONE.name: EVERYONE}
        self.secret, self.now = secret or secrets.token_urlsafe(32), now
        self._asked: dict[str, deque[float]] = {name: deque() for name in self.names}
        self._used: dict[str, deque[tuple[float, float]]] = {name: deque() for name in self.names}
        self._begun: dict[str, dict[str, float]] = {name: {} for name in self.names}

    @classmethod
    def load(cls, path: str | Path, protocols: Collection[str]) -> Access:
        """Reads a file of keys, whose scopes may name `protocols`.

        Raises:
          InputError: the file is missing, or says anything else than keys.
        """
        try:
            found = msgspec.json.decode(Path(path).read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InputError(f"no keys in {path}: {error}") from error
        for key in found.keys:
            if not key.key.startswith("sha256:") and not _TOKEN.fullmatch(key.key):
                # Browsers send it as a WebSocket's subprotocol, which is a token (RFC 9110, section 5.6.2).
                raise InputError(f"{path}: key {key.name!r} has characters that HTTP headers cannot carry as they are")
            if len(key.key) < 8 or not key.name or not set(key.scopes or ()) <= set(protocols):
                known = ", ".join(sorted(protocols))
                raise InputError(f"{path}: key {key.name!r} needs a name, 8 characters and scopes of {known}")
        access = cls(found.keys, found.secret)
        if not found.keys or len(access.keys) < len(found.keys) or len(access.names) < len(found.keys):
            raise InputError(f"{path} has no keys, or two with one name, or one twice")
        if found.secret and len(found.secret) < 32:
            raise InputError(f"{path}: the secret needs 32 characters")
        return access

    def authenticate(self, token: str | None) -> Grant:
        """Raises `Refused` where the token is none of ours."""
        if token is not None and token.startswith(PREFIX):
            claims = self._claims(token)
            key = self.names.get(claims["sub"])
            if key is None:
                raise Refused(401, "invalid_api_key", "the key that this one was made from is no longer known")
            scopes = frozenset(claims["scopes"])
            if key.scopes is not None:
                scopes &= set(key.scopes)
            return Grant(key, scopes, claims["session"], self.now() >= claims["exp"])
        if not self.keys:
            return Grant(EVERYONE, None)
        if not token:
            raise Refused(401, "missing_api_key", "this server asks for a key: Authorization: Bearer KEY")
        key = self.keys.get(_digest(token))
        if key is None:
            raise Refused(401, "invalid_api_key", "this key is not known")
        return Grant(key, None if key.scopes is None else frozenset(key.scopes))

    def create_short_lived_key(
        self, grant: Grant, expires_at: int, scopes: Iterable[str], session: dict[str, Any] | None
    ) -> str:
        """A key of at most the same scopes, good until `expires_at` (Unix time) for beginning sessions."""
        claims = {
            "sub": grant.key.name,
            "exp": expires_at,
            "scopes": sorted(set(scopes) if grant.scopes is None else grant.scopes & set(scopes)),
            "session": session,
        }
        return PREFIX + jwt.encode(claims, self.secret, algorithm="HS256")

    def _claims(self, token: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                token[len(PREFIX) :].encode(errors="replace"),
                self.secret,
                algorithms=["HS256"],
                options={"verify_exp": False, "require": ["exp", "sub", "scopes", "session"]},
            )
        except jwt.InvalidTokenError as error:
            raise Refused(401, "invalid_api_key", "this short-lived key is not one of this server's") from error

    def count_request(self, grant: Grant) -> None:
        """Counts a request. Raises `Refused` where there were too many in the last minute, or the key has expired."""
        if grant.expired:
            raise Refused(401, "expired_api_key", "this short-lived key has expired")
        asked, now = self._asked[grant.key.name], self.now()
        while asked and asked[0] <= now - _MINUTE_S:
            asked.popleft()
        if len(asked) >= grant.key.requests_per_minute:
            after_s = asked[0] + _MINUTE_S - now
            raise Refused(429, "rate_limit_exceeded", "too many requests with this key in a minute", after_s)
        asked.append(now)

    def check_session(self, grant: Grant, scope: str) -> None:
        """Raises `Refused` where the key is not for this protocol, or is used up."""
        name = grant.key.name
        if grant.scopes is not None and scope not in grant.scopes:
            raise Refused(403, "insufficient_scope", f"this key is not for {scope}")
        begun = self._begun[name]
        if len(begun) >= grant.key.sessions:
            raise Refused(429, "session_limit_exceeded", f"this key has its {len(begun)} sessions", 5.0)
        if self.minutes_used(name) >= grant.key.minutes_per_day:
            after_s = self._used[name][0][0] + _DAY_S - self.now() if self._used[name] else _MINUTE_S
            raise Refused(429, "quota_exceeded", "this key has had its minutes of the last 24 hours", after_s)

    def begin_session(self, grant: Grant, session: str, scope: str) -> None:
        """Counts a session from now on. Raises as `check`."""
        self.check_session(grant, scope)
        self._begun[grant.key.name][session] = self.now()

    def end_session(self, name: str, session: str) -> None:
        """The session of that key is over."""
        began = self._begun[name].pop(session, None)
        if began is None:
            return
        used, now = self._used[name], self.now()
        if used and now < used[-1][0] + _MINUTE_S:  # one entry a minute, however many sessions
            used[-1] = (used[-1][0], used[-1][1] + now - began)
        else:
            used.append((now, now - began))

    def remaining_s(self, grant: Grant) -> float:
        """Seconds that each session of the key has left today, if there are as many as now."""
        name = grant.key.name
        return max(0.0, 60 * (grant.key.minutes_per_day - self.minutes_used(name))) / max(1, len(self._begun[name]))

    def minutes_used(self, name: str) -> float:
        """Minutes of sessions that ended in the last 24 hours or go on."""
        used, now = self._used[name], self.now()
        while used and used[0][0] <= now - _DAY_S:
            used.popleft()
        return (sum(lasted for _, lasted in used) + sum(now - began for began in self._begun[name].values())) / 60


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
