"""Sample conversations during training: the real step on sessions with voices that training never hears.

Called by `train.loop`. Writes a stereo WAV per session (user left, model right) and returns what was heard and said.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.data.dataset import ConversationDataset, open_dataset
from jaxtml.model.spec import Params
from jaxtml.session.engine import Engine, replies
from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.text import TextCodec

SESSIONS = 4


class Sampler:
    """Four fixed sessions with unseen voices, and the step that is compiled for them once."""

    def __init__(self, config: Config, params: Params, codec: TextCodec, data: Path):
        dataset = open_dataset(config, codec, data, split="test")
        assert isinstance(dataset, ConversationDataset)
        self.talks = [dataset.conversation(i) for i in range(SESSIONS)]
        self.engine = Engine.create(config, params, codec)

    def run(self, params: Params, folder: Path) -> str:
        """Converses with `params`; returns heard and said words against the true ones, and writes them to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.params = jax.jit(self.engine.duplex.prepare)(params)
        lines = []
        said = replies(self.engine, [talk.user for talk in self.talks], typed=[talk.typed for talk in self.talks])
        for i, (talk, reply) in enumerate(zip(self.talks, said, strict=True)):
            write_wav(folder / f"{i}.wav", np.stack([talk.user, reply.wave], axis=1))
            lines += [
                f"{i} {talk.scenario}",
                f"  user  {' '.join([*(word.text for word in talk.user_words), *(text for _, text in talk.typed)])}",
                f"  heard {reply.heard}",
                f"  right {talk.expected}",
                f"  said  {reply.text}",
            ]
        text = "\n".join(lines)
        (folder / "samples.txt").write_text(text + "\n")
        return text
