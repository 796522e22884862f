"""The server's log: one event with named fields per line, as text or as JSON.

Called by every part of the server. Before changing it, know that an API key or a token must never be a field.
"""

from __future__ import annotations

import logging
import time

from absl import logging as absl

from jaxtml.strict_json import dumps

_FIELDS = "jaxtml_fields"  # attribute of a log record that holds the event and its fields


def event(name: str, **fields: object) -> None:
    """Logs one event, for example `session began` with the fields `session`, `key` and `protocol`."""
    text = " ".join(f"{field}={value}" for field, value in fields.items())
    absl.info("%s%s", name, f": {text}" if text else "", extra={_FIELDS: {"event": name, **fields}})


def use_json() -> None:
    """Switches the log to JSON: from now on each line on stderr is one object."""
    absl.get_absl_handler().setFormatter(_JsonFormatter())


class _JsonFormatter(logging.Formatter):
    """Formats a log record as one JSON object: time, level, event, fields, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time_utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{time_utc}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **getattr(record, _FIELDS, {"event": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return dumps(line)
