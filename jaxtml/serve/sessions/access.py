"""Access to a server: API keys from a file, short-lived keys made from them, and quotas. It knows nothing of networks.

`serve.protocols.service` calls it to authenticate requests. The session manager and the routes of the protocols call it
to count requests, and the session manager also to count sessions.

The file of keys is JSON:

    {"secret": "...", "keys": [{"name": "team-a", "key": "sk-...", "sessions": 8}]}

`Key` lists the fields of a key. Its `key` is the API key itself, or `sha256:` and the key's SHA-256 digest in hex.

A short-lived key is a JSON Web Token (RFC 7519), signed with the secret, so every server with the same file accepts it.
Without a secret in the file, a server signs with a random secret, and only that server accepts its short-lived keys.

Without a file, everyone may do everything. `jaxtml serve` allows this on the machine's loopback interface only.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import jwt
import msgspec

from jaxtml.errors import InputError
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.json_errors import read_json

SHORT_LIVED_PREFIX = "ek_"  # of short-lived keys, as in OpenAI's API
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile("[0-9a-f]{64}")
_MIN_KEY_LENGTH, _MIN_SECRET_LENGTH = 8, 32  # characters
# Browsers send the key as a WebSocket subprotocol, which must be a token (RFC 9110, section 5.6.2).
_HTTP_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FORMAT = "docs/serving.md, section Keys and quotas, has an example"
_MINUTE_S, _DAY_S = 60.0, 86_400.0


# Limits below these would lock the key's holder out.
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Minutes = Annotated[float, msgspec.Meta(gt=0)]


class Key(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An API key and what its holder may do. The field names are those of the file of keys.

    Attributes:
      name: name of the key in logs and traces, where the key itself never appears.
      key: the API key, or `sha256:` and its digest.
      sessions: sessions at a time, at most. The default is no limit in practice.
      minutes_per_day: minutes of sessions in any 24 hours, at most. The default is no limit.
      requests_per_minute: requests for sessions, for short-lived keys, and for further connections that watch a session
        (sidebands), at most. The default is no limit in practice.
      scopes: names of the protocols that the key may use; None: all protocols.
    """

    name: str
    key: str = ""
    sessions: _Count = 1_000_000
    minutes_per_day: _Minutes = float("inf")
    requests_per_minute: _Count = 1_000_000
    scopes: tuple[str, ...] | None = None


class _KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: tuple[Key, ...]
    secret: str = ""


class Grant(msgspec.Struct, frozen=True):
    """What the sender of a request may do.

    Attributes:
      key: the sender's API key. For a short-lived key, the API key from which it was made.
      scopes: names of the protocols that the sender may use; None: all protocols.
      session: the session's configuration, which a short-lived key may carry; None: the sender is free to choose.
      expired: whether the short-lived key has expired. It can begin nothing new, but its running sessions go on.
    """

    key: Key
    scopes: frozenset[str] | None
    session: dict[str, Any] | None = None
    expired: bool = False


EVERYONE = Key(name="everyone")


class Access:
    """The keys of a server and what they have used. Not thread-safe.

    Args:
      keys: the API keys; empty: everyone may do everything.
      secret: signs short-lived keys; empty: a random secret.
      now: returns the Unix time in seconds.
    """

    def __init__(self, keys: Iterable[Key] = (), secret: str = "", now: Callable[[], float] = time.time):
        self.now = now
        # The keys of these three dictionaries are the names of API keys, also of keys that a newer file no longer has.
        # Times of the requests in the last minute:
        self._requests: defaultdict[str, deque[float]] = defaultdict(deque)
        # Sessions that ended within the same minute share an entry: (end of the first one, seconds of all of them).
        self._used: defaultdict[str, deque[tuple[float, float]]] = defaultdict(deque)
        # The start of each live session, by the name of the session:
        self._live: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._has_own_secret = bool(secret)
        self.secret = secret or secrets.token_urlsafe(32)
        self._set_keys({_key_digest(key): key for key in keys})

    @classmethod
    def load(cls, path: str | Path, protocols: Collection[str]) -> Access:
        """Reads a file of keys.

        Args:
          path: the file.
          protocols: names of the protocols, which the scopes of a key may name.

        Raises:
          InputError: the file cannot be read, or something in it is wrong. The message never quotes a key.
        """
        try:
            file = read_json(Path(path).read_bytes(), _KeysFile)
        except OSError as error:
            raise InputError(f"no keys in {path}: {error.strerror}; name a file of keys ({_FORMAT})") from error
        except InvalidMessage as invalid:
            raise InputError(f"no keys in {path}: {invalid}; {_FORMAT}") from invalid
        for key in file.keys:
            if key.key.startswith(_DIGEST_PREFIX) and not _DIGEST.fullmatch(_key_digest(key)):
                text = f"after {_DIGEST_PREFIX} come the 64 hex digits of the key's SHA-256"
                raise InputError(f"{path}: the key of {key.name!r} cannot be used: {text}")
            if not key.key.startswith(_DIGEST_PREFIX) and not _HTTP_TOKEN.fullmatch(key.key):
                raise InputError(f"{path}: key {key.name!r} has characters that HTTP headers cannot carry as they are")
            if len(key.key) < _MIN_KEY_LENGTH or not key.name or not set(key.scopes or ()) <= set(protocols):
                known = ", ".join(sorted(protocols))
                raise InputError(
                    f"{path}: the entry {key.name!r} is wrong. Each entry needs a name, a key of at least "
                    f"{_MIN_KEY_LENGTH} characters, and no scopes other than {known}"
                )
        access = cls(file.keys, file.secret)
        if not file.keys:
            raise InputError(f"{path} has no keys")
        if len(access.keys) < len(file.keys) or len(access.keys_by_name) < len(file.keys):
            raise InputError(f"{path} has the same key twice, or two keys with the same name")
        if file.secret and len(file.secret) < _MIN_SECRET_LENGTH:
            raise InputError(f"{path}: the secret needs at least {_MIN_SECRET_LENGTH} characters")
        return access

    def replace_keys(self, other: Access) -> None:
        """Takes over the keys and the secret of `other`. What the keys have used stays counted, by their names.

        A short-lived key stays valid if the key from which it was made is still there, and the secret stays the same.
        The server's random secret stays the same if neither the old nor the new file has a secret.
        """
        if other._has_own_secret or self._has_own_secret:
            self.secret, self._has_own_secret = other.secret, other._has_own_secret
        self._set_keys(other.keys)

    def _set_keys(self, keys: dict[str, Key]) -> None:
        self.keys = keys
        self.keys_by_name = {key.name: key for key in keys.values()} or {EVERYONE.name: EVERYONE}

    def authenticate(self, token: str | None) -> Grant:
        """Returns what the sender of a request may do.

        Args:
          token: the API key or short-lived key in the request; None: there is none.

        Raises:
          Refused: the server does not know the key.
        """
        if token is not None and token.startswith(SHORT_LIVED_PREFIX):
            claims = self._read_claims(token)
            key = self.keys_by_name.get(claims["sub"])
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
        """Returns a new short-lived key.

        Args:
          grant: the grant of the sender. The new key gets no more scopes than this grant has.
          expires_at: Unix time in seconds until which the new key may begin sessions.
          scopes: names of the protocols that the new key may use.
          session: the configuration that sessions of the new key get; None: the client is free to choose.
        """
        claims = {
            "sub": grant.key.name,
            "exp": expires_at,
            "scopes": sorted(set(scopes) if grant.scopes is None else grant.scopes & set(scopes)),
            "session": session,
        }
        return SHORT_LIVED_PREFIX + jwt.encode(claims, self.secret, algorithm="HS256")

    def _read_claims(self, token: str) -> dict[str, Any]:
        """Returns what a short-lived key says, also if it has expired. Raises `Refused` on a wrong signature."""
        try:
            return jwt.decode(
                token[len(SHORT_LIVED_PREFIX) :].encode(errors="replace"),
                self.secret,
                algorithms=["HS256"],
                options={"verify_exp": False, "require": ["exp", "sub", "scopes"]},
            )
        except jwt.InvalidTokenError as error:
            raise Refused(401, "invalid_api_key", "this short-lived key is not one of this server's") from error

    def count_request(self, grant: Grant) -> None:
        """Counts a request.

        Raises:
          Refused: the key sent too many requests in the last minute, or has expired.
        """
        if grant.expired:
            raise Refused(401, "expired_api_key", "this short-lived key has expired")
        requests, now = self._requests[grant.key.name], self.now()
        while requests and requests[0] <= now - _MINUTE_S:
            requests.popleft()
        if len(requests) >= grant.key.requests_per_minute:
            retry_after_s = requests[0] + _MINUTE_S - now
            raise Refused(429, "rate_limit_exceeded", "too many requests with this key in a minute", retry_after_s)
        requests.append(now)

    def is_at_session_limit(self, grant: Grant) -> bool:
        """Returns whether the key has as many live sessions as it may have."""
        return len(self._live[grant.key.name]) >= grant.key.sessions

    def check_session(self, grant: Grant, scope: str, replaces: bool = False) -> None:
        """Checks whether a session may begin.

        Args:
          grant: what the sender of the request may do.
          scope: name of the session's protocol.
          replaces: another session of the key will end when this one begins.

        Raises:
          Refused: the key is not for this protocol, or has used up its sessions or its minutes.
        """
        name = grant.key.name
        if grant.scopes is not None and scope not in grant.scopes:
            raise Refused(403, "insufficient_scope", f"this key is not for {scope}")
        if self.is_at_session_limit(grant) and not replaces:
            text = f"this key has {len(self._live[name])} sessions already, and may have no more"
            raise Refused(429, "session_limit_exceeded", text, 5.0)
        if self.minutes_used(name) >= grant.key.minutes_per_day:
            retry_after_s = self._used[name][0][0] + _DAY_S - self.now() if self._used[name] else _MINUTE_S
            text = "this key has used up its minutes of the last 24 hours"
            raise Refused(429, "quota_exceeded", text, retry_after_s)

    def begin_session(self, grant: Grant, session: str, scope: str) -> None:
        """Starts counting a session as live; `session` is its public name. Raises `Refused` as `check_session`."""
        self.check_session(grant, scope)
        self._live[grant.key.name][session] = self.now()

    def end_session(self, name: str, session: str) -> None:
        """Stops counting a session of the key `name` as live. Does nothing if the session was not counted."""
        began_at = self._live[name].pop(session, None)
        if began_at is None:
            return
        used, now = self._used[name], self.now()
        if used and now < used[-1][0] + _MINUTE_S:  # one entry per minute, so that short sessions take no memory
            used[-1] = (used[-1][0], used[-1][1] + now - began_at)
        else:
            used.append((now, now - began_at))

    def remaining_s(self, grant: Grant) -> float:
        """Returns the seconds that each live session of the key has left, if the number of sessions stays as it is."""
        name = grant.key.name
        return max(0.0, 60 * (grant.key.minutes_per_day - self.minutes_used(name))) / max(1, len(self._live[name]))

    def minutes_used(self, name: str) -> float:
        """Returns the minutes of the key's live sessions and of its sessions that ended in the last 24 hours."""
        used, now = self._used[name], self.now()
        while used and used[0][0] <= now - _DAY_S:
            used.popleft()
        return (sum(lasted for _, lasted in used) + sum(now - began for began in self._live[name].values())) / 60


def _key_digest(key: Key) -> str:
    """Returns the digest by which a key is found, whether the file has the key or its digest."""
    return key.key.removeprefix(_DIGEST_PREFIX).lower() if key.key.startswith(_DIGEST_PREFIX) else _digest(key.key)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
