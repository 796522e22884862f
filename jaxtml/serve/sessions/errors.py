"""The errors that a client is told: a request that is refused, and a message that cannot be used.

Raised by `serve.sessions` and `serve.protocols`. A protocol writes an `InvalidMessage` as its own error event.
`serve.web.middleware` answers a `Refused` as an HTTP error. If a WebSocket of GPT-Live is open already, the routes of
GPT-Live answer a `Refused` as an error event.
"""

from __future__ import annotations


class Refused(Exception):
    """The server refuses a request, for good or for now.

    Attributes:
      status: HTTP status code.
      code: short machine-readable name of the error.
      retry_after_s: seconds after which the client may try again; None: trying again does not help.
      param: path of the field of the request that is wrong; None: no single field is.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: float | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.retry_after_s, self.param = status, code, retry_after_s, param


class InvalidMessage(Exception):
    """The server cannot use a client's message.

    Attributes:
      code: short machine-readable name of the error.
      param: path of the field that is wrong; None: no single field is.
      event_id: the client's own id of the message, if it gave one.
    """

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None):
        super().__init__(message)
        self.code, self.param, self.event_id = code, param, event_id

    def as_refusal(self) -> Refused:
        """Returns the refusal of an HTTP request.

        The wrong field is in the body of the request, or in the configuration that its short-lived key carries.
        """
        text = str(self) if self.param is None or self.param in str(self) else f"{self.param}: {self}"
        return Refused(400, self.code, text, param=self.param)
