"""The tree of config dataclasses: every size, rate and limit of a model, its training and its serving.

A field's type carries the rule for its value (`jaxtml.config.rules`); the text below the field gives its
meaning, its unit, and the reason of the default. A class with a `check` method has rules between its fields.
"As released" means: as in the open checkpoint Inkling-Small.

A micro-turn is 200 ms of input and output (`jaxtml.stream.timebase`). It is the unit in which a model hears and speaks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from jaxtml.config.rules import (
    Dtype,
    Fraction,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Range,
    check_fields,
)
from jaxtml.errors import InputError

CONTROL_IDS = 16  # token ids that are reserved for control tokens, see `jaxtml.stream.tokens.CONTROLS`
PATCH_FRAMES, PATCH_SIDE = 2, 40  # a patch covers two frames of 40 x 40 pixels
AUDIO_FRAMES = 4  # dMel frames of a micro-turn; of the user, and as many of own speech (`jaxtml.stream.timebase`)


@dataclass(frozen=True)
class AttentionConfig:
    """One kind of attention layer: sliding or global."""

    n_heads: PositiveInt
    """Query heads; a multiple of `n_kv_heads`."""

    n_kv_heads: PositiveInt
    """Heads of keys and values. Each serves `n_heads / n_kv_heads` query heads."""

    head_dim: PositiveInt
    """Width of one head."""

    window: PositiveInt
    """Tokens that a query sees, its own included: a key is visible at distances `[0, window)`."""

    rel_extent: PositiveInt
    """Distance in tokens beyond which the relative bias is zero."""

    pinned: Annotated[int, Range(0, 512)] = 0
    """How many tokens at the start of a session stay visible at any distance. Attention over whole sequences works on
    blocks of 512 tokens (`jaxtml.model.attention.blockwise`), and all pinned tokens have to fit into the first block.
    0 by default, as released."""

    retained: Annotated[int, Range(0, 2**24)] = 0
    """How many tokens stay visible beyond the window because they belong to a micro-turn with text: its clock, its
    words and its pictures (`jaxtml.model.attention.retention`). The oldest of them make room for new ones. A retained
    token takes as much memory as a token of the window, and lasts much longer, because most tokens are sound. Global
    layers only. 0 by default, as released."""

    def check(self, path: str) -> None:
        """Raises `InputError` where fields contradict each other.

        Args:
          path: the path of this object in the config, with a dot at its end.
        """
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"{path}n_heads {self.n_heads}: give a multiple of {path}n_kv_heads, {self.n_kv_heads}")
        if self.retained and self.rel_extent > self.window:
            raise InputError(
                f"{path}rel_extent {self.rel_extent}: retained tokens beyond the window have no bias, so with "
                f"{path}retained give at most {path}window, {self.window}"
            )


@dataclass(frozen=True)
class BackboneConfig:
    """The Inkling decoder, see `jaxtml.model.backbone`."""

    vocab_size: PositiveInt
    """Rows of the embedding and columns of the unembedding: text tokens, control tokens and unused ids."""

    d_model: PositiveInt
    """Width of the hidden state."""

    n_layers: LayerCount
    """Number of layers. The prediction heads (`mtp_heads`) do not count."""

    n_dense: NonNegativeInt
    """How many of the first layers have a dense feed-forward part; at most `n_layers`. The others have experts."""

    global_layers: tuple[int, ...]
    """Indices in `[0, n_layers)` of the layers with global attention. The others have sliding attention."""

    sliding: AttentionConfig
    """Attention of the sliding layers."""

    global_: AttentionConfig
    """Attention of the global layers."""

    d_ff_dense: PositiveInt
    """Hidden width of a dense feed-forward part."""

    d_ff_expert: PositiveInt
    """Hidden width of each expert, routed or shared."""

    n_experts: PositiveInt
    """Routed experts of a layer."""

    experts_per_token: PositiveInt
    """Routed experts that work on a token, at most `n_experts`."""

    n_shared_experts: PositiveInt
    """Experts that work on every token, besides the routed ones."""

    logits_divisor: PositiveFloat
    """Hidden states are divided by this number before the unembedding. Released models call the number
    `logits_mup_width_multiplier`."""

    unpadded_vocab_size: PositiveInt | None = None
    """Size of a released model's vocabulary without the padding of its embedding. A conversion places the control
    tokens in the padding, from this id on. None: the model does not come from a release, or has no padding."""

    d_rel: PositiveInt = 16
    """Width of the state, per head, from which the relative bias of a query is computed. As released."""

    route_scale: PositiveFloat = 8.0
    """Factor on the weights of a token's experts. As released."""

    conv_kernel: PositiveInt = 4
    """Tokens that a short convolution sees, its own included. As released."""

    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in an RMS norm. As released."""

    log_scaling_floor: PositiveInt | None = None
    """Tokens. Past this position the logits of global attention grow with the logarithm of the position. None: the
    logits never grow. This suits a model whose sessions are too short to need it."""

    log_scaling_alpha: NonNegativeFloat = 0.1
    """Past `log_scaling_floor`, the logits of global attention are multiplied by
    `1 + log_scaling_alpha * ln((position + 1) / log_scaling_floor)`. Positions count from 0. As released."""

    init_std: NonNegativeFloat = 0.02
    """Standard deviation of initial weights. As released. `tiny`, which is narrow, takes 0.05."""

    mtp_heads: Annotated[int, Range(0, 4096)] = 0
    """Heads of multi-token prediction, each for one position further ahead (`jaxtml.model.mtp`). Only training
    uses them. 0 by default, as they cost training time."""

    mtp_global: tuple[int, ...] = ()
    """Indices in `[0, mtp_heads)` of the heads with global attention. The others have sliding attention."""

    def check(self, path: str) -> None:
        """Raises `InputError` where fields contradict each other.

        Args:
          path: the path of this object in the config, with a dot at its end.
        """
        self.sliding.check(f"{path}sliding.")
        self.global_.check(f"{path}global_.")
        if self.sliding.retained:
            raise InputError(f"{path}sliding.retained {self.sliding.retained}: give 0, only global layers retain")
        if self.global_.retained and not self.global_layers:
            raise InputError(
                f"{path}global_.retained {self.global_.retained}: no layer is global, so give 0, or name layers in "
                f"{path}global_layers"
            )
        if self.n_dense > self.n_layers:
            raise InputError(f"{path}n_dense {self.n_dense}: there are {self.n_layers} layers")
        if any(not 0 <= layer < self.n_layers for layer in self.global_layers):
            raise InputError(f"{path}global_layers {self.global_layers}: layers are 0..{self.n_layers - 1}")
        if any(not 0 <= head < self.mtp_heads for head in self.mtp_global):
            raise InputError(f"{path}mtp_global {self.mtp_global}: there are {self.mtp_heads} heads ({path}mtp_heads)")
        if self.experts_per_token > self.n_experts:
            raise InputError(f"{path}experts_per_token {self.experts_per_token}: there are {self.n_experts} experts")


@dataclass(frozen=True)
class VisionConfig:
    """The hMLP tower: one token from each patch of 2 frames of 40 x 40 pixels."""

    folds: tuple[tuple[int, int, int], ...] = ((1, 5, 128), (1, 2, 320), (1, 4, 4800), (2, 1, 0))
    """`(time, side, width)` of each layer. A layer folds `time` frames of `side x side` cells into one cell of `width`
    channels. The product of all times has to be 2 frames, and the product of all sides 40 pixels. The last layer always
    has the width of the model: write 0. An empty tuple makes a model without a vision tower. The default is as
    released."""

    def check(self, path: str) -> None:
        """Raises `InputError` where the layers do not fold a patch into one token.

        Args:
          path: the path of this object in the config, with a dot at its end.
        """
        side = time = 1
        for fold_time, fold_side, _ in self.folds:
            time, side = time * fold_time, side * fold_side
        if self.folds and (time, side) != (PATCH_FRAMES, PATCH_SIDE):
            raise InputError(
                f"{path}folds cover {time} frames of {side} x {side}, not {PATCH_FRAMES} of {PATCH_SIDE} x {PATCH_SIDE}"
            )


@dataclass(frozen=True)
class DuplexConfig:
    """What fits into one micro-turn, and how its tokens are chosen. Limits are tokens per micro-turn."""

    control_base: NonNegativeInt
    """The first of the 16 ids of control tokens (`jaxtml.stream.tokens.Control`), in the unused tail of the
    vocabulary."""

    max_typed: NonNegativeInt = 8
    """Text that the user typed, or background text (`serve.background_text`). The limit counts the control token before
    the text. Longer text continues in the next micro-turn. A limit of 8 admits 7 tokens of text per micro-turn, or 35 a
    second. A person types more slowly."""

    max_patches: NonNegativeInt = 0
    """Patches of video. A patch covers the same square of two frames, 100 ms apart. 0 by default: no video."""

    max_heard: NonNegativeInt = 6
    """Transcript of the user. The limit does not count the control token before the text. Six tokens per micro-turn are
    30 a second, more than a person says."""

    max_text: NonNegativeInt = 8
    """Text of the assistant. The limit does not count the control token before the text."""

    heard: bool = True
    """Whether the model writes down what the user says. The transcript gives a small model words to reason over."""

    draft: Annotated[int, Range(0, 16)] = 4
    """Text tokens that a small network guesses ahead (`jaxtml.model.draft`), so that one forward call verifies several.
    The tokens are the same with any number. 0: one token per call."""

    temperature: NonNegativeFloat = 0.0
    """Temperature of sampling text tokens. 0 takes the likeliest token, so that a session can be repeated."""

    top_p: Annotated[float, Range(0, 1, open_below=True)] = 1.0
    """Sampling chooses among the likeliest tokens that together have this probability. 1 leaves out none."""

    gate_threshold: Fraction = 0.5
    """The gate decides in each micro-turn whether the model speaks. It speaks if P(speak) is above this threshold. 0.5
    takes the likelier of the two."""

    @property
    def longest_micro_turn(self) -> int:
        """Tokens of the longest micro-turn: clock, typed text, patches, user frames, words and own frames."""
        heard = self.max_heard + 1 if self.heard else 0
        return 1 + self.max_typed + self.max_patches + AUDIO_FRAMES + heard + self.max_text + 1 + AUDIO_FRAMES


@dataclass(frozen=True)
class FlowConfig:
    """The flow head: a hidden state gives the next 50 ms of speech, 80 coarse and 4 x 80 fine log-mels
    (`jaxtml.model.speech.flow`)."""

    width: PositiveInt
    """Hidden width of the head."""

    depth: LayerCount
    """Layers of the head."""

    draws: PositiveInt = 4
    """Noise draws per position over which the training loss is averaged. Chosen by hand; `tiny` takes 2."""

    steps: PositiveInt = 4
    """Euler steps per 50 ms when the model speaks. More steps cost time and follow the flow more closely."""

    temperature: NonNegativeFloat = 0.6
    """Factor on the noise that speech starts from. Word errors of `tiny` hardly change between 0.1 and 0.6
    (EXPERIMENTS.md, 2026-11-24)."""

    history_noise: NonNegativeFloat = 0.15
    """The largest standard deviation of the noise that training adds to the model's own earlier speech, before the
    model reads this speech as input. The unit is a bin: a quantised log-mel level. In a session the model reads speech
    that it made itself, which is never quite right (`corrupt_history` in `jaxtml.train.history`)."""

    history_dropout: NonNegativeFloat = 0.0
    """Training leaves out a share of the model's own earlier frames. Each row draws its share between 0 and this
    number. A share of 1 or more leaves out all frames; with 1.5 (`tiny`), a third of the rows lose all. Without
    dropout, a small model continues recordings that it has learnt by heart, and ignores the text."""


@dataclass(frozen=True)
class VocoderConfig:
    """The causal ConvNeXt vocoder, see `jaxtml.model.speech.vocoder`.

    The defaults have 1.6M parameters and take 0.75 ms of a micro-turn on a CPU.
    """

    width: PositiveInt = 192
    """Channels."""

    depth: LayerCount = 6
    """ConvNeXt blocks. The first half finds the pitch, and the second half receives it as an input."""

    expansion: PositiveInt = 3
    """Hidden width of a block as a multiple of `width`. ConvNeXt has 4; 3 costs less."""

    kernel: PositiveInt = 7
    """Frames of 12.5 ms that a block's convolution sees, its own included. As in ConvNeXt."""


@dataclass(frozen=True)
class DataConfig:
    """What training sees: sessions mixed from a speech bank and encoded as rows (`jaxtml.data.conversations`)."""

    seed: NonNegativeInt = 1
    """Row `i` depends on this seed and on `i` alone."""

    turns: PositiveInt = 100
    """Micro-turns of a session. 100 are 20 seconds: a few user turns."""

    tokens: PositiveInt = 768
    """Positions of a row. Longer sessions are cut, shorter ones padded. 768 hold 20 seconds with words and speech."""

    heard_delay_ms: NonNegativeInt = 120
    """Milliseconds after a word's end from which its transcript may be written. Chosen by hand."""

    text_lead_ms: NonNegativeInt = 2000
    """Milliseconds by which the assistant's text precedes its sound. Text never precedes the micro-turn in which the
    assistant begins to speak. So 2,000 put a whole short reply into that micro-turn. When text was spread over several
    micro-turns, the model cut it short (EXPERIMENTS.md, 2026-11-23)."""

    misheard: Fraction = 0.3
    """Share of the rows in whose transcript some words are wrong. Such rows teach the model to trust the sound more
    than its own transcript (`jaxtml.data.conversations`)."""

    max_patches: NonNegativeInt | None = None
    """Patches of a row, at most. A dataset with video cuts a session before the micro-turn whose patches find no room.
    Each patch takes 38 kB of every row of such a dataset. Rows of generated conversations have no patches. None: as
    many as `duplex.max_patches` and `tokens` allow."""

    longest_silence: PositiveInt | None = None
    """Micro-turns. Of a longer silence, in which nobody says a word, types or shows anything, a row leaves out the
    middle: long sessions then fit into short rows. The clock of the next micro-turn tells how long the silence was. A
    model whose global layers retain text (`retained`) can learn from such rows to use what was said hours before. None
    leaves out nothing."""

    dataset: str = "conversations"
    """Name of the dataset that training reads. `jaxtml.data.dataset` has the names, and says how to add a dataset."""


@dataclass(frozen=True)
class TrainConfig:
    """The training run (`jaxtml.train`). The defaults suit `tiny` on two CPU cores."""

    steps: PositiveInt = 1000
    """Updates of the whole run. The learning rate's course depends on them."""

    batch: Annotated[int, Range(1, 10**6)] = 8
    """Rows of one update, over all devices. An update of `tiny` with eight rows takes 1.6 seconds on two CPU cores."""

    learning_rate: NonNegativeFloat = 2e-3
    """The highest learning rate of AdamW. Large models want less (`inkling_small`: 2e-4)."""

    warmup: NonNegativeInt = 200
    """Steps over which the learning rate rises from 0. Chosen by hand; 50 are enough after `--start-from`."""

    decay: Fraction = 0.3
    """Share of all steps, at the end, over which the learning rate falls linearly to 0. Between warm-up and decay
    the learning rate is constant (WSD, Hu et al., 2024)."""

    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of matrices in AdamW; norms, biases and scales do not decay. The usual value."""

    clip_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm. The usual value."""

    norm_limit: PositiveFloat = 1000.0
    """A step whose gradient norm is not below this limit changes no parameter. 1,000 is far above a healthy norm, so
    only a broken batch is skipped."""

    beta2: Fraction = 0.98
    """Decay of AdamW's second moment. 0.98 averages over about 50 steps, which suits runs of a few thousand."""

    compute_dtype: Dtype = "float32"
    """Dtype of activations and of the weights in matrix products. bfloat16 is slower on a CPU and faster elsewhere."""

    param_dtype: Dtype = "float32"
    """Dtype of the master copy of the parameters."""

    moment_dtype: Dtype = "float32"
    """Dtype of AdamW's first moment. The second moment has the dtype of the parameters."""

    remat: Annotated[str, OneOf("none", "outputs", "full")] = "none"
    """What the backward pass computes again, to save memory. "none": nothing. "outputs": a layer, except the outputs of
    its attention and feed-forward part. "full": a whole layer. On a mesh that shards weights over `data` or `expert`,
    "none" also keeps the gathered weights of every layer. Whatever `remat` is, such a mesh sums gradients in
    `compute_dtype`."""

    accumulate: PositiveInt = 1
    """Parts into which each device cuts its rows; they are computed one after the other to save memory."""

    transport: Annotated[str, OneOf("ring", "ragged")] = "ring"
    """How tokens reach their experts on a mesh (`jaxtml.model.experts.transports`). "ring" runs everywhere. "ragged"
    sends a token only to the devices of its experts; CPUs cannot run it."""

    capacity: PositiveFloat | None = None
    """Size of the buffer in which a device collects the tokens of its experts, padding included. The unit is the number
    of tokens per device if all experts were equally busy. Tokens that do not fit are dropped and counted. None: the
    buffer has room for the worst case, and no token is dropped."""

    seed: NonNegativeInt = 0
    """Seed of initial parameters and of the noise in every step."""

    bias_rate: NonNegativeFloat = 0.001
    """Step by which the router's bias moves towards balanced experts. As in auxiliary-loss-free balancing (Wang et al.,
    2024). `tiny` takes 0.003: with 0.001, some of its experts were unused for the first 200 steps."""

    z_loss: NonNegativeFloat = 1e-4
    """Weight of the router's z-loss. Small: the loss only keeps the router's logits from drifting."""

    flow_weight: NonNegativeFloat = 1.0
    """Weight of the flow head's loss. `tiny` takes 6, as this loss is small beside the others."""

    gate_weight: NonNegativeFloat = 1.0
    """Weight of the gate's cross-entropy. All token losses have the same weight by default. Then the probabilities of
    tokens that compete at a position stay calibrated."""

    heard_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of the transcript."""

    text_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of what the assistant says."""

    mtp_weight: NonNegativeFloat = 0.1
    """Weight of the prediction heads' cross-entropy, a mean over heads. As at the end of DeepSeek-V3's training."""

    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints. 500 are a quarter of an hour of `tiny` on two cores."""

    sample_every: PositiveInt = 1000
    """Steps between sample conversations. A run on a mesh takes no samples."""


@dataclass(frozen=True)
class ServeConfig:
    """How sessions are served."""

    sessions: Annotated[int, Range(1, 10**6)] = 8
    """Simultaneous sessions for which `jaxtml plan` plans a server. `jaxtml serve` ignores this field: its
    `--max-sessions` sets the limit."""

    compute_dtype: Dtype = "float32"
    """Dtype of activations and weights. bfloat16 is slower on a CPU and faster elsewhere."""

    int8_experts: bool = False
    """Whether the routed experts are kept as int8 with one scale per column. They take half the memory of bfloat16; the
    logits of `tiny` change by 0.2 % of their norm."""

    transport: Annotated[str, OneOf("replicated", "ring")] = "ring"
    """How tokens reach their experts on a mesh (`jaxtml.model.experts.transports`). "replicated": every device has all
    tokens, and the results are summed. "ring": tokens are gathered from all devices, and results scattered back."""

    background_text: bool = False
    """Whether a server gives the model background text: instructions, tools, an earlier conversation, and results of
    functions and of the background model. The background model is the larger model to which this model delegates
    requests. A model that was not trained on such text answers it with nonsense. If the field is false, a server keeps
    such text from the model, and tells the client. Set it to true for a model that was trained on such text. False is
    right for `tiny`, and for a converted release: a release has never read our control tokens."""


@dataclass(frozen=True)
class Config:
    """A whole model with its data, its training and its serving."""

    name: str
    """The config's name, in logs and reports."""

    backbone: BackboneConfig
    """The decoder."""

    duplex: DuplexConfig
    """The micro-turn."""

    flow: FlowConfig
    """The head that speaks."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower, which turns patches of images into tokens."""

    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    """The vocoder, which turns log-mels into sound."""

    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    """Serving."""

    def check(self) -> None:
        """Raises `InputError` where fields of the tree contradict each other."""
        self.backbone.check("backbone.")
        self.vision.check("vision.")
        if self.duplex.max_patches and not self.vision.folds:
            raise InputError(
                f"duplex.max_patches {self.duplex.max_patches}: vision.folds is empty, so no tower reads patches"
            )
        global_ = self.backbone.global_
        if global_.retained and global_.window < self.duplex.longest_micro_turn:
            raise InputError(
                f"backbone.global_.window {global_.window}: a micro-turn has up to {self.duplex.longest_micro_turn} "
                "tokens, and all must still be in the window when its text is retained: give at least as many"
            )
        if self.duplex.control_base + CONTROL_IDS > self.backbone.vocab_size:
            raise InputError(
                f"duplex.control_base {self.duplex.control_base}: {CONTROL_IDS} control ids do not fit the vocabulary"
            )
        if self.vision.folds and self.vision.folds[-1][2] not in (0, self.backbone.d_model):
            raise InputError("vision.folds: the last layer always has the width of the model, write 0 as its width")


def validate(config: Config) -> None:
    """Raises `InputError`, which names the field, where a value is out of range or fields contradict each other."""
    check_fields(config)
    config.check()
