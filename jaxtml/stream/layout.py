"""The layout of a micro-turn in the token sequence, and the arrays of an encoded conversation.

`jaxtml.stream.encoding` turns a conversation into these arrays, `jaxtml.stream.decoding` reads them back, and
`jaxtml.stream.text_plan` decides which text stands in which micro-turn. The compiled step (`jaxtml.model.duplex`)
produces the same layout in a session.

One micro-turn, in this order (P patches, N typed tokens, H heard tokens, K text tokens):

    given:      TURN+clock   [TYPED|BACKGROUND N text]   P patches   user dMel x 4
    generated:  [HEARD H words]   [SAY K text]   (LISTEN)
            or  [HEARD H words]   [SAY K text]   (SPEAK)   own speech x 4

The given part is known before the model generates anything. Its last position predicts the first generated token.
TYPED begins text of the user. BACKGROUND begins text from elsewhere, such as instructions or an answer of the
background model: the larger model to which the assistant can delegate a request. HEARD begins the transcript of the
user's words, SAY begins the assistant's text. LISTEN or SPEAK is the gate: it decides whether the assistant is silent
or speaks in this micro-turn. The gate is predicted, but it has no position of its own: what follows, own speech or the
next TURN, shows the model what was decided. The four own-speech positions hold the dMel frames that the assistant spoke
in the micro-turn before, or silence. The hidden state of each predicts 50 ms of this micro-turn. So all four are known
when the gate is decided, and one forward pass computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtml.stream.timebase import FINE_PER_FRAME, N_MELS

SPEECH_DIM = N_MELS * (1 + FINE_PER_FRAME)
"""Numbers that an own-speech position predicts: one coarse and four fine log-mel frames."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as one sequence of positions.

    Axes: T positions, M micro-turns, P patches, S own-speech positions.

    Attributes:
      kind: `[T]` uint8, the `PositionKind` of each position.
      ids: `[T]` int32, the token id at TEXT and TURN positions, 0 elsewhere.
      bins: `[T, 80]` uint8, the dMel frame at USER and OWN positions, 0 elsewhere.
      clock: `[M, CLOCK_FEATURES]` float32, the clock features of each micro-turn.
      micro_turn: `[T]` int32, the micro-turn of each position.
      patches: `[P, 2, 40, 40, 3]` float32, in the order of the PATCH positions.
      target: `[T]` int32, the token to predict; it has a meaning where `term` is not NONE.
      term: `[T]` uint8, the `Term` of the prediction made at each position.
      speech_at: `[S]` int32, the OWN positions.
      speech: `[S, 400]` float32, the log-mels that the OWN positions predict.
    """

    kind: np.ndarray
    ids: np.ndarray
    bins: np.ndarray
    clock: np.ndarray
    micro_turn: np.ndarray
    patches: np.ndarray
    target: np.ndarray
    term: np.ndarray
    speech_at: np.ndarray
    speech: np.ndarray
