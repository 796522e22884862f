"""The control tokens, the kinds of position and the loss terms, by number.

The numbers are part of every checkpoint, and of every row cache (rows of training data on disk, `jaxtml.data.cache`).
So add new numbers, and never renumber. Control ids start at `DuplexConfig.control_base`, in the unused tail of the
vocabulary (200058..201023 for the released Inkling model).
"""

from enum import IntEnum


class Control(IntEnum):
    """Control tokens as offsets from `control_base`."""

    TURN = 0  # opens a micro-turn; carries the clock
    TYPED = 1  # text that the user typed follows
    BACKGROUND = 2  # text from elsewhere follows: instructions, or an answer of the background model (see `layout`)
    HEARD = 3  # the running transcript of the user follows
    SAY = 4  # the assistant's text follows
    LISTEN = 5  # the gate: the micro-turn stays silent
    SPEAK = 6  # the gate: four own-speech positions follow
    DELEGATE = 7  # inside the assistant's text: a request to the background model follows
    END = 8  # the request ends; the assistant's text goes on


CONTROLS = 16
"""The number of ids that are reserved for control tokens."""


class PositionKind(IntEnum):
    """What stands at a position of the sequence. It decides how the position is embedded."""

    PAD = 0
    TEXT = 1  # a text or control token
    TURN = 2  # the TURN control token plus clock features
    USER = 3  # a dMel frame of the user
    OWN = 4  # own speech: holds the dMel frame of the 50 ms spoken 200 ms earlier, and predicts 50 ms
    PATCH = 5  # a 40 x 40 patch of a frame pair


class Term(IntEnum):
    """The loss term of the prediction that is made at a position."""

    NONE = 0
    GATE = 1
    HEARD = 2
    TEXT = 3
