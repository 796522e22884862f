"""Names of the control tokens and of the kinds of position; both are part of every checkpoint's meaning.

Control ids start at `DuplexConfig.control_base`, in the vocabulary's unused tail (200058..201023 in Inkling's).
"""

from enum import IntEnum


class Control(IntEnum):
    """Control tokens as offsets from `control_base`."""

    TURN = 0  # opens a micro-turn; carries the clock
    TYPED = 1  # typed text of the user follows
    BACKGROUND = 2  # text of the background model follows
    HEARD = 3  # running transcript of the user follows
    SAY = 4  # the assistant's text follows
    LISTEN = 5  # gate: the micro-turn stays silent
    SPEAK = 6  # gate: four own-speech positions follow
    DELEGATE = 7  # inside the assistant's text: a request to the background model follows
    END = 8  # ends a delegation


CONTROLS = 16  # ids reserved


class PositionKind(IntEnum):
    """What stands at a position of the sequence, hence how it is embedded."""

    PAD = 0
    TEXT = 1  # a text or control token
    TURN = 2  # the TURN control token plus clock features
    USER = 3  # one dMel frame of the user
    OWN = 4  # the dMel frame of own speech before the one to be spoken
    PATCH = 5  # one 40 x 40 patch of the frame pair


class Term(IntEnum):
    """Which loss term predicts from a position."""

    NONE = 0
    GATE = 1
    HEARD = 2
    TEXT = 3
