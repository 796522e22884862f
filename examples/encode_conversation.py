"""Shows the tokens of a conversation, micro-turn by micro-turn: `python examples/encode_conversation.py`.

The conversation is made of noise, with one typed message, one word of the user and one answer. Training data is made of
the same `Conversation`, with real speech. `jaxtml.stream.layout` explains the order of the positions.
"""

from itertools import groupby

import numpy as np

import jaxtml
from jaxtml.stream.tokens import Control, PositionKind, Term

SECONDS = 2.0
rng = np.random.default_rng(0)
samples = round(SECONDS * 16_000)
user = (0.05 * rng.standard_normal(samples)).astype(np.float32)
assistant = np.zeros(samples, np.float32)
assistant[1 * 16_000 :] = 0.05 * rng.standard_normal(samples - 16_000)

conversation = jaxtml.Conversation(
    user=user,
    assistant=assistant,
    user_words=(jaxtml.Word("seven", 0.1, 0.5),),
    # The output of micro-turns 4 to 8 is heard one micro-turn later, from 1.0 s on.
    speech=(jaxtml.Speech(4, 9, (jaxtml.Word("seven", 1.1, 1.5),)),),
    typed=((0, "hello"),),
)

model = jaxtml.load()
base = model.config.duplex.control_base
encoded = model.encode(conversation)
for turn, positions in groupby(range(len(encoded.kind)), key=lambda i: int(encoded.micro_turn[i])):
    words = []
    for i in positions:
        kind, token = PositionKind(encoded.kind[i]), int(encoded.ids[i])
        if kind in (PositionKind.USER, PositionKind.OWN):
            words.append(kind.name.lower())
        else:
            words.append(Control(token - base).name if token >= base else repr(model.codec.decode([token])))
        if encoded.term[i] == Term.GATE:  # the gate is predicted here, and has no position of its own
            words.append(f"({Control(int(encoded.target[i]) - base).name})")
    print(f"{turn * 0.2:4.1f} s  {' '.join(words)}")

decoded = model.decode(encoded)
print(f"heard: {[word.text for word in decoded.heard]}")
print(f"said: {[word.text for stretch in decoded.speech for word in stretch.words]}")
