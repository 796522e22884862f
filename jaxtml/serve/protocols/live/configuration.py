"""What this server can give to a GPT-Live session. Called by `routes`, before a session is admitted."""

from __future__ import annotations

from jaxtml.serve.protocols.live.messages import LiveSessionConfig
from jaxtml.serve.sessions.client_session import ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import check_length

_INSTRUCTIONS_TOKENS = 16_384
_HISTORY_TOKENS, _HISTORY_MESSAGES = 8_192, 128


def check(config: LiveSessionConfig, model: ServedModel) -> None:
    """Checks that this server can give a client the session that it asks for.

    Raises:
      InvalidMessage: the server cannot; names the field.
    """
    if not model.is_called(config.model):
        raise InvalidMessage("model_not_found", model.refuse(config.model), "session.model")
    if config.delegation is not None and config.delegation.type != "client":
        text = "this server sends delegations to the client only"
        raise InvalidMessage("unsupported_value", text, "session.delegation.type")
    unsupported = {"store": config.store, "triggers": config.triggers, "client": config.client}
    for name, value in unsupported.items():
        if value:
            raise InvalidMessage("unsupported_parameter", f"this server does not support {name}", f"session.{name}")
    history = [item.content[0].text for item in config.input or ()]
    if len(history) > _HISTORY_MESSAGES:
        raise InvalidMessage("invalid_value", f"a history has at most {_HISTORY_MESSAGES} messages", "session.input")
    if not all(history):
        raise InvalidMessage("invalid_value", "a message of the history has no text", "session.input")
    check_length(model, config.instructions or "", _INSTRUCTIONS_TOKENS, "session.instructions")
    check_length(model, "".join(history), _HISTORY_TOKENS, "session.input")
