"""The server's log: what happened and its fields, as a line of text or of JSON; no key or token is ever among them."""

from __future__ import annotations

import json
import logging
import time

from absl import logging as absl

_FIELDS = "jaxtml_fields"


def event(what: str, **fields: object) -> None:
    """Something happened, as `session began` with session, key and protocol."""
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    absl.info("%s%s", what, f": {text}" if text else "", extra={_FIELDS: {"event": what, **fields}})


def use_json() -> None:
    """From now on the log is one JSON object a line, on stderr."""
    absl.get_absl_handler().setFormatter(_Json())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **getattr(record, _FIELDS, {"event": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
