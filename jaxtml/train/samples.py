"""Sample conversations during training, with voices that training never hears: the dataset's split "test".

Called by `jaxtml.train.loop`. The samples run the same duplex step as the server (`jaxtml.model.duplex`).
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.data.dataset import ConversationDataset, open_dataset
from jaxtml.model.spec import Params
from jaxtml.session.converse import replies
from jaxtml.session.engine import Engine
from jaxtml.session.records import Reply
from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.text import TextCodec

SESSIONS = 4


class Sampler:
    """Four fixed conversations, and the duplex step, which is compiled for them once."""

    def __init__(self, config: Config, params: Params, codec: TextCodec, data: Path):
        """Reads the conversations from the dataset in `data`.

        Raises:
          InputError: the dataset has no test voices.
        """
        dataset = open_dataset(config, codec, data, split="test")
        assert isinstance(dataset, ConversationDataset)
        self.conversations = [dataset.conversation(i) for i in range(SESSIONS)]
        self.engine = Engine.create(config, params, codec)

    def run(self, params: Params, folder: Path) -> str:
        """Lets the model of `params` answer the conversations, and writes its sessions to `folder`.

        Each session becomes a stereo WAV (user left, model right). The words go to `samples.txt`.

        Returns:
          For each session, as text: the user's words, what the model heard, the right answer and the model's answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.params = jax.jit(self.engine.duplex.prepare)(params)
        answers = replies(
            self.engine,
            [conversation.user for conversation in self.conversations],
            typed=[conversation.typed for conversation in self.conversations],
        )
        lines = []
        for number, (conversation, reply) in enumerate(zip(self.conversations, answers, strict=True)):
            write_wav(folder / f"{number}.wav", np.stack([conversation.user, reply.wave], axis=1))
            lines += _lines(number, conversation, reply)
        text = "\n".join(lines)
        (folder / "samples.txt").write_text(text + "\n")
        return text


def _lines(number: int, conversation: Conversation, reply: Reply) -> list[str]:
    """Returns one session as text: its scenario, the user's words, and what the model heard and said."""
    user = [*(word.text for word in conversation.user_words), *(text for _, text in conversation.typed)]
    return [
        f"{number} {conversation.scenario}",
        f"  user  {' '.join(user)}",
        f"  heard {reply.heard}",
        f"  right {conversation.expected}",
        f"  said  {reply.text}",
    ]
