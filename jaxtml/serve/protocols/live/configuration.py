"""What this server can give to a GPT-Live session. Called by `routes`, before a session is admitted."""

from __future__ import annotations

from jaxtml.serve.protocols.live.messages import Delegation, LiveSessionConfig
from jaxtml.serve.protocols.messages import fields_without_effect
from jaxtml.serve.sessions.client_session import BACKGROUND_UNREAD, ServedModel
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
    check_delegation(config.delegation)
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


def check_delegation(delegation: Delegation | None) -> None:
    """Checks who shall do the tasks that the model delegates; None: the client does not say.

    Raises:
      InvalidMessage: this server cannot delegate in this way; names the field.
    """
    if delegation is None:
        return
    if delegation.type != "client":
        text = "this server sends delegations to the client only"
        raise InvalidMessage("unsupported_value", text, "session.delegation.type")
    if delegation.acknowledgement_delay_ms:
        text = "the model decides itself when it speaks: the delay can only be 0"
        raise InvalidMessage("unsupported_value", text, "session.delegation.acknowledgement_delay_ms")
    for name in ("responses", "decisions"):
        if getattr(delegation, name) is not None:
            text = f"{name} belongs to another type of delegation"
            raise InvalidMessage("unsupported_parameter", text, f"session.delegation.{name}")


def without_effect(config: LiveSessionConfig, model: ServedModel) -> dict[str, str]:
    """Returns what the client asks for and does not get: paths of fields, each with the reason."""
    found = fields_without_effect(config)
    if not model.reads_background:
        unread = {"instructions": config.instructions, "input": config.input}
        found |= {name: BACKGROUND_UNREAD for name, value in unread.items() if value}
    return found
