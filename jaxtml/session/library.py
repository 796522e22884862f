"""`load`, `Model` and `Session`: what a Python program uses. `jaxtml` exports them.

`jaxtml converse` and the examples use them too.

    model = jaxtml.load()
    reply = model.converse(wave)             # a whole recording
    session = model.session(seed=0)          # or 200 ms at a time
    turn = session.step(chunk)

Both give the same result, to the bit, because `Model.converse` steps a session. A step takes 200 ms of input and gives
200 ms of output: one micro-turn. This module checks all arguments of a caller before they reach the model. It raises
`InputError` for arguments that cannot be used.

Axes: N samples at 16 kHz, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.session.batch import SessionBatch, SessionInput
from jaxtml.session.converse import micro_turns_of
from jaxtml.session.engine import Engine
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream import decoding, encoding
from jaxtml.stream.clock import WEEK_MS
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.stream.tokens import Control

NOON_MS = 12 * 3_600_000
"""Monday noon, in milliseconds since Monday, 00:00 UTC: the wall clock at which a session begins by default.

A recording has no wall clock. With a fixed one, a reply depends on the recording and the seed alone.
"""

_MAX_SEED = 2**32 - 1
_MAX_SAMPLE = 16.0  # full scale is 1; integers stored as floats reach thousands
_PATCH_SHAPE = (2, 40, 40, 3)


def load(directory: str | Path | None = None, mesh: str | None = None) -> Model:
    """Loads a model onto the first device, or onto a mesh of all devices.

    Args:
      directory: a checkpoint of this project, a training run (its newest checkpoint), or a released Inkling checkpoint;
        None: the `tiny` model that ships with the package.
      mesh: how the devices share the model, such as "expert=8" or "expert=4,tensor=2"; None: the first device alone.

    Raises:
      InputError: there is no readable checkpoint, or no tokenizer beside it; or the mesh does not fit the devices or
        the model.
    """
    from jaxtml.checkpoint.files import SHIPPED

    shape = MeshShape() if mesh is None else MeshShape.parse(mesh)
    return Model(Engine.load(SHIPPED if directory is None else directory, shape))


class Model:
    """A loaded model. It may have any number of sessions. Only one thread at a time may use it and its sessions.

    The first session compiles the step that computes 200 ms of a session. That takes between seconds (`tiny`) and
    minutes. Set `JAX_COMPILATION_CACHE_DIR` to a folder to keep compiled programs from run to run.
    """

    def __init__(self, engine: Engine):
        """Most callers use `load` instead."""
        self.engine = engine

    @property
    def config(self) -> Config:
        """The resolved config of the checkpoint."""
        return self.engine.config

    @property
    def codec(self) -> TextCodec:
        """Text to the model's token ids and back."""
        return self.engine.codec

    def session(self, seed: int = 0, week_ms: int = NOON_MS) -> Session:
        """Begins a session.

        Args:
          seed: of the sampling, in [0, 2**32). The same seed and the same input give the same session.
          week_ms: wall clock at the beginning, in milliseconds since Monday, 00:00 UTC.

        Raises:
          InputError: the seed or the clock is not in its range.
        """
        return Session(self, seed, week_ms)

    def converse(
        self,
        wave: np.ndarray,
        seed: int = 0,
        typed: Iterable[tuple[int, str]] = (),
        patches: Sequence[np.ndarray | None] = (),
        week_ms: int = NOON_MS,
    ) -> Reply:
        """Runs a session over a whole recording of the user.

        Args:
          wave: `[N]` float32 at 16 kHz, full scale 1, at least 200 ms. The last micro-turn is filled with silence.
          seed: as for `session`.
          typed: pairs `(micro-turn, text)`: the text that the user has typed by the beginning of the micro-turn with
            this index.
          patches: video, by micro-turn: `[P, 2, 40, 40, 3]` float32 (from `jaxtml.stream.images.image_patches`), or
            None where a micro-turn has none. It may end before the recording.
          week_ms: as for `session`.

        Returns:
          The reply. It is as long as `wave`, and its sample i is heard at the time of sample i of `wave`.

        Raises:
          InputError: as `session` and `Session.step`; a recording shorter than 200 ms; text or video for a micro-turn
            that the recording does not have.
        """
        return Reply.join(list(self.stream(wave, seed, typed, patches, week_ms)), len(wave))

    def stream(
        self,
        wave: np.ndarray,
        seed: int = 0,
        typed: Iterable[tuple[int, str]] = (),
        patches: Sequence[np.ndarray | None] = (),
        week_ms: int = NOON_MS,
    ) -> Iterator[MicroTurn]:
        """Runs the session of `converse` with the same arguments, and yields each micro-turn when it is computed."""
        _check_samples(wave, "wave")
        if len(wave) < MICRO_TURN_SAMPLES:
            raise InputError(
                f"wave has {len(wave)} samples, a micro-turn needs {MICRO_TURN_SAMPLES}: append silence (zeros)"
            )
        micro_turns = micro_turns_of(len(wave))
        texts = _texts_by_micro_turn(typed, micro_turns)
        if len(patches) > micro_turns:
            raise InputError(f"patches has {len(patches)} entries, wave has {micro_turns} micro-turns: shorten patches")
        padded = np.pad(wave, (0, micro_turns * MICRO_TURN_SAMPLES - len(wave)))
        chunks = padded.reshape(micro_turns, MICRO_TURN_SAMPLES)
        session = self.session(seed, week_ms)
        return (
            session.step(chunk, typed=texts.get(i, ()), patches=patches[i] if i < len(patches) else None)
            for i, chunk in enumerate(chunks)
        )

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Encodes a conversation as the tokens and frames that the model is trained on, micro-turn by micro-turn.

        `jaxtml.stream.layout` describes the order of the positions. `jaxtml.stream.encoding` says what encoding loses.

        Raises:
          InputError: the waveforms differ in length or are not whole micro-turns, stretches of speech overlap, or a
            micro-turn has more patches than the config allows.
        """
        config = self.config
        try:
            return encoding.encode(
                conversation,
                self.codec,
                config.duplex,
                heard_delay_ms=config.data.heard_delay_ms,
                lead_ms=config.data.text_lead_ms,
            )
        except ValueError as error:
            raise InputError(f"the conversation cannot be encoded: {error}") from error

    def decode(self, encoded: EncodedConversation) -> decoding.DecodedConversation:
        """Reads an encoded conversation back: words with their times, and the user's log-mels."""
        return decoding.decode(encoded, self.codec, self.config.duplex)


class Session:
    """One conversation with a model, 200 ms at a time. `Model.session` makes it.

    Memory and the time of a step stay the same however long a session lasts. The model remembers as far back as its
    attention windows reach (`config.backbone`).
    """

    def __init__(self, model: Model, seed: int = 0, week_ms: int = NOON_MS):
        """See `Model.session`."""
        if not isinstance(seed, int | np.integer) or not 0 <= seed <= _MAX_SEED:
            raise InputError(f"seed {seed}: give an integer from 0 to {_MAX_SEED}")
        if not isinstance(week_ms, int | np.integer) or not 0 <= week_ms < WEEK_MS:
            raise InputError(f"week_ms {week_ms}: give milliseconds since Monday, from 0 to {WEEK_MS - 1}")
        self._engine = model.engine
        self._batch = SessionBatch(model.engine, 1, int(seed), int(week_ms))
        self._waiting: dict[Control, list[int]] = {Control.TYPED: [], Control.BACKGROUND: []}

    @property
    def t_ms(self) -> int:
        """When the next micro-turn begins, in milliseconds since the session began."""
        return self._batch.t_ms

    def step(
        self,
        chunk: np.ndarray,
        typed: str | Iterable[str] = (),
        background: str | Iterable[str] = (),
        patches: np.ndarray | None = None,
    ) -> MicroTurn:
        """Gives the model the next 200 ms of the user, and returns what the model heard, wrote and says.

        The returned sound is heard in the 200 ms after `chunk`. Text that does not fit into this micro-turn
        (`config.duplex.max_typed` tokens) goes on in the next ones, typed text before background text.

        Args:
          chunk: `[3200]` float32 at 16 kHz, full scale 1.
          typed: text that the user has typed; several texts are joined.
          background: text that the user did not type, such as instructions or the answer to `MicroTurn.delegate`. Only
            a model that was trained on such text makes sense of it (`config.serve.background_text`).
          patches: `[P, 2, 40, 40, 3]` float32, the user's video (from `jaxtml.stream.images.image_patches`).

        Raises:
          InputError: an argument has the wrong shape, dtype or length, has NaN or infinite values, or is more than the
            model's config allows. The session is then as before and can go on.
        """
        _check_samples(chunk, "chunk")
        if len(chunk) != MICRO_TURN_SAMPLES:
            raise InputError(
                f"chunk has {len(chunk)} samples: give {MICRO_TURN_SAMPLES}, which are 200 ms at {SAMPLE_RATE} Hz"
            )
        self._check_patches(patches)
        tokens = {Control.TYPED: self._tokens(typed), Control.BACKGROUND: self._tokens(background)}
        for mark, waiting in self._waiting.items():
            waiting += tokens[mark]
        mark, text = self._next_text()
        _, (micro_turn,) = self._batch.step([SessionInput(chunk, text, mark, patches)])
        return micro_turn

    def _tokens(self, texts: str | Iterable[str]) -> list[int]:
        texts = [texts] if isinstance(texts, str) else texts
        tokens = [token for text in texts for token in self._engine.codec.encode(text)]
        if tokens and self._text_room < 1:
            raise InputError(f"the model {self._engine.config.name!r} takes no text (duplex.max_typed is too small)")
        return tokens

    @property
    def _text_room(self) -> int:
        """Tokens of text for which a micro-turn has room after the control token (TYPED or BACKGROUND)."""
        return self._engine.config.duplex.max_typed - 1

    def _next_text(self) -> tuple[Control, tuple[int, ...]]:
        """Takes the next micro-turn's text from the waiting text. A micro-turn gets either typed or background text."""
        for mark, waiting in self._waiting.items():
            if waiting:
                text = tuple(waiting[: self._text_room])
                del waiting[: self._text_room]
                return mark, text
        return Control.TYPED, ()

    def _check_patches(self, patches: np.ndarray | None) -> None:
        if patches is None:
            return
        duplex, name = self._engine.config.duplex, self._engine.config.name
        if not duplex.max_patches:
            raise InputError(f"the model {name!r} takes no video (duplex.max_patches is 0): leave patches out")
        if patches.dtype != np.float32 or patches.ndim != 5 or patches.shape[1:] != _PATCH_SHAPE:
            raise InputError(
                f"patches is {patches.dtype} {list(patches.shape)}: give float32 [P, 2, 40, 40, 3], "
                f"as jaxtml.stream.images.image_patches makes them"
            )
        if len(patches) > duplex.max_patches:
            raise InputError(
                f"patches has {len(patches)} patches, the model {name!r} takes {duplex.max_patches} "
                f"in a micro-turn: scale the picture down"
            )
        if not np.isfinite(patches).all():
            raise InputError("patches has NaN or infinite values: give pixels as image_patches scales them")


def _check_samples(wave: np.ndarray, name: str) -> None:
    """Raises `InputError` where `wave` is not `[N]` float32 samples with full scale 1."""
    if not isinstance(wave, np.ndarray):
        raise InputError(f"{name} is a {type(wave).__name__}: give a NumPy array, with numpy.asarray")
    if wave.ndim != 1:
        raise InputError(
            f"{name} has shape {list(wave.shape)}: give one channel, [N], such as the mean of the channels"
        )
    if wave.dtype != np.float32:
        remedy = f"{name}.astype(numpy.float32)" + (" / 32768" if wave.dtype == np.int16 else "")
        raise InputError(f"{name} has dtype {wave.dtype}: give float32 with full scale 1, such as {remedy}")
    if not np.isfinite(wave).all():
        raise InputError(f"{name} has NaN or infinite samples: replace them, for example with numpy.nan_to_num")
    if len(wave) and (peak := float(np.abs(wave).max())) > _MAX_SAMPLE:
        raise InputError(f"{name} reaches {peak:.0f} where full scale is 1: divide it, by 32768 for 16-bit samples")


def _texts_by_micro_turn(typed: Iterable[tuple[int, str]], micro_turns: int) -> dict[int, list[str]]:
    texts: dict[int, list[str]] = {}
    for micro_turn, text in typed:
        if not 0 <= micro_turn < micro_turns:
            raise InputError(
                f"typed has text for micro-turn {micro_turn}: the recording has micro-turns 0 to {micro_turns - 1}"
            )
        texts.setdefault(micro_turn, []).append(text)
    return texts
