"""The vocoder: turns fine log-mel frames into a waveform; causal and streaming, with a source and a filter.

Axes: B sessions, F fine frames (80 Hz), S = 200 samples of a hop, D width, M = 80 mels, K = 129 bins of a filter's
response, T = 256 taps of a filter, C = 2 sources (0: pulses, 1: noise). `duplex.step` runs `vocode` once per micro-turn
of 200 ms, on 16 frames. `jaxtml.train.vocoder` trains it on segments of recordings.

A causal ConvNeXt (Liu et al., 2022, arXiv:2201.03545; as the backbone of a vocoder: Vocos, Siuzdak 2023,
arXiv:2306.00814) reads the frames at 80 Hz. For each frame it gives a pitch and two short filters. One filter shapes a
pulse train of that pitch, the other shapes white noise (neural source-filter: Wang et al. 2018, arXiv:1810.11946;
differentiable filters: Agrawal et al. 2024, arXiv:2401.10460). The phase of the voice comes from an integrator, so the
small network need not invent it, and spectral losses are enough to train it.

The samples of hop i depend only on frames up to i. A frame's pitch and filters hold at the END of its hop. Over the hop
they fade linearly from those of the frame before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtml.config import VocoderConfig
from jaxtml.model.spec import Params, SpecTable, bind, normal, ones, param, specs, zeros
from jaxtml.stream.dmel import mel_filterbank
from jaxtml.stream.timebase import FINE_HOP, FINE_WINDOW, N_MELS, SAMPLE_RATE

VocoderState = dict[str, Any]  # see `init_state`

TAPS = 256  # 16 ms: the response of a vocal tract, and a spectral resolution of 62.5 Hz
BINS = TAPS // 2 + 1
# Taps of a filter before its time zero. They add no delay: nothing prescribes where a pulse stands, so a pulse may as
# well stand 48 samples earlier.
LEAD = 48
PITCH_MIN = 60.0  # Hz
PITCH_OCTAVES = 3.0
# Classes of pitch, 30 cents each. A class is learnt faster than a number, and does not average two octaves.
PITCH_STEPS = 120
# Hz. Phase is counted in integers on this grid, so that a stream and a complete utterance add up to the same phase.
PITCH_GRID = 0.5
_CYCLE = round(2**32 * PITCH_GRID * FINE_HOP / (2 * SAMPLE_RATE))  # uint32 phase of one grid unit over half a hop
_TOP_HZ = 7900.0  # there is no harmonic above
_FFT = 512  # >= TAPS + FINE_HOP - 1, and at most three hops


class Controls(NamedTuple):
    """What the network gives for each frame; all hold at the end of the frame's hop.

    Attributes:
      pitch: `[B, F, 120]`, logits over classes of pitch.
      hz: `[B, F]`, the pitch with which the pulses are made.
      taps: `[B, F, 2, 256]`, the two filters.
    """

    pitch: jax.Array
    hz: jax.Array
    taps: jax.Array


@lru_cache
def _bins_from_mels() -> tuple[np.ndarray, np.ndarray]:
    """Returns weights `[80, 129]` and offset `[129]` that give a filter's natural log magnitude from log10 mels.

    The magnitude of a bin is interpolated between the mel channels around the bin. A mel is a weighted sum of the
    magnitudes of a Hann-windowed spectrum. The offset subtracts the level of a white source of variance one: both
    sources of the vocoder are white and have this variance.
    """
    filters = mel_filterbank(FINE_WINDOW)
    hz = np.linspace(0, SAMPLE_RATE / 2, len(filters))
    centres = (hz @ filters) / filters.sum(axis=0)
    places = np.interp(np.linspace(0, SAMPLE_RATE / 2, BINS), centres, np.arange(N_MELS))
    weights = np.maximum(0.0, 1.0 - np.abs(places[None, :] - np.arange(N_MELS)[:, None]))
    window_rms = np.sqrt(FINE_WINDOW * 3 / 8)
    offset = -np.log(np.interp(places, np.arange(N_MELS), filters.sum(axis=0)) * window_rms)
    return (np.log(10.0) * weights).astype(np.float32), offset.astype(np.float32)


@lru_cache
def _tap_window() -> np.ndarray:
    """Returns a window `[256]` that rises over LEAD samples and then falls; it keeps a filter's ends from clicking."""
    rise = np.sin(np.pi / 2 * (np.arange(LEAD) + 0.5) / LEAD) ** 2
    fall = np.cos(np.pi / 2 * (np.arange(TAPS - LEAD) + 0.5) / (TAPS - LEAD)) ** 2
    return np.concatenate([rise, fall]).astype(np.float32)


class VocoderBlock(nnx.Module):
    """A ConvNeXt block: a depthwise causal convolution, a layer norm, two dense layers, and the residual."""

    def __init__(self, cfg: VocoderConfig) -> None:
        hidden = cfg.expansion * cfg.width
        self.conv = param((cfg.kernel, cfg.width), ("kernel", "out"), normal(cfg.kernel**-0.5))
        self.scale = param((cfg.width,), ("out",), ones)
        self.shift = param((cfg.width,), ("out",), zeros)
        self.up = param((cfg.width, hidden), ("in", "out"), normal(cfg.width**-0.5))
        self.up_bias = param((hidden,), ("out",), zeros)
        self.down = param((hidden, cfg.width), ("in", "out"), normal(0.5 * hidden**-0.5))

    def __call__(self, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs the block; `tail` is the last inputs before `x`.

        Args:
          tail: `[B, kernel - 1, D]`.
          x: `[B, F, D]`.

        Returns:
          The next tail, and `[B, F, D]`.
        """
        padded = jnp.concatenate([tail, x], axis=1)
        frames, kernel = x.shape[1], self.conv.shape[0]
        # A sum of shifted products: XLA's depthwise convolution is several times slower on a CPU.
        y = sum(padded[:, k : k + frames] * self.conv[k] for k in range(kernel))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        y = jax.nn.gelu((y * self.scale[...] + self.shift[...]) @ self.up[...] + self.up_bias[...])
        return padded[:, frames:], x + y @ self.down[...]


class Vocoder(nnx.Module):
    """The network at frame rate: frames `[B, F, 80]` -> `Controls`.

    The first half of the blocks finds the pitch, and the second half receives it as an input. Some mel channels are
    narrower than the distance between harmonics. How to read an envelope from such channels depends on where the
    harmonics are.
    """

    def __init__(self, cfg: VocoderConfig) -> None:
        self.depth = cfg.depth
        self.embed = param((cfg.kernel * N_MELS, cfg.width), ("in", "out"), normal((cfg.kernel * N_MELS) ** -0.5))
        self.embed_bias = param((cfg.width,), ("out",), zeros)
        self.noise_embed = param((N_MELS, cfg.width), ("in", "out"), normal(0.3 * N_MELS**-0.5))
        self.noise_share = param((BINS,), ("out",), lambda rng, shape: np.full(shape, 0.5, np.float32))
        for i in range(cfg.depth):
            setattr(self, f"block{i}", VocoderBlock(cfg))
        self.pitch_norm = param((cfg.width,), ("out",), ones)
        self.pitch_head = param((cfg.width, PITCH_STEPS), ("in", "out"), normal(cfg.width**-0.5))
        self.pitch_bias = param((PITCH_STEPS,), ("out",), zeros)
        self.pitch_embed = param((PITCH_STEPS, cfg.width), ("in", "out"), normal(0.5))
        self.norm = param((cfg.width,), ("out",), ones)
        self.head = param((cfg.width, 3 * BINS), ("in", "out"), normal(0.1 * cfg.width**-0.5))
        self.head_bias = param((3 * BINS,), ("out",), zeros)

    def __call__(
        self, tails: dict[str, jax.Array], frames: jax.Array, excess: jax.Array, known_hz: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], Controls]:
        """Runs the network.

        Args:
          tails: the last inputs of each convolution.
          frames: `[B, F, 80]`, fine log-mels.
          excess: `[B, F, 80]`, from `_noise_excess`.
          known_hz: `[B, F]`, a pitch that replaces the network's own; 0 where unknown. None: unknown everywhere.

        Returns:
          The next tails, and the controls.
        """
        count = frames.shape[1]
        padded = jnp.concatenate([tails["embed"], (frames + 2.0) / 1.5], axis=1)
        kernel = self.embed.shape[0] // N_MELS
        windows = jnp.concatenate([padded[:, k : k + count] for k in range(kernel)], axis=-1)
        after = {"embed": padded[:, count:]}
        x = windows @ self.embed[...] + self.embed_bias[...] + excess @ self.noise_embed[...]
        for i in range(self.depth):
            if i == self.depth // 2:
                logits = _rms_normalise(x) * self.pitch_norm[...] @ self.pitch_head[...] + self.pitch_bias[...]
                hz = pitch_hz(jax.lax.stop_gradient(logits))
                hz = hz if known_hz is None else jnp.where(known_hz > 0, known_hz, hz)
                x = x + pitch_weights(hz) @ self.pitch_embed[...]
            name = f"block{i}"
            after[name], x = getattr(self, name)(tails[name], x)
        pulses, phase, noise = jnp.split(
            _rms_normalise(x) * self.norm[...] @ self.head[...] + self.head_bias[...], 3, axis=-1
        )
        noise = noise - excess @ _bins_from_mels()[0] * self.noise_share[...]
        return after, Controls(logits, hz, _taps(frames, pulses, phase, noise))


def _rms_normalise(x: jax.Array) -> jax.Array:
    """Divides by the root mean square of the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def pitch_hz(logits: jax.Array) -> jax.Array:
    """Returns the pitch in Hz on PITCH_GRID, the mean of the classes around the likeliest: `[..., 120]` -> `[...]`."""
    near = jnp.abs(jnp.arange(PITCH_STEPS) - jnp.argmax(logits, axis=-1, keepdims=True)) <= 3
    weights = jax.nn.softmax(jnp.where(near, logits, -jnp.inf), axis=-1)
    octaves = (weights @ jnp.arange(PITCH_STEPS, dtype=jnp.float32) + 0.5) * (PITCH_OCTAVES / PITCH_STEPS)
    return jnp.round(PITCH_MIN * jnp.exp2(octaves) / PITCH_GRID) * PITCH_GRID


def pitch_weights(hz: jax.Array) -> jax.Array:
    """Returns how near each class is to a pitch in Hz: `[...]` -> `[..., 120]`, at most two classes above zero."""
    place = jnp.log2(hz / PITCH_MIN) * (PITCH_STEPS / PITCH_OCTAVES) - 0.5
    return jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - jnp.arange(PITCH_STEPS)))


def _taps(frames: jax.Array, pulses: jax.Array, phase: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the filters `[B, F, 2, 256]`.

    Their envelope is read from `frames` `[B, F, 80]`. The network corrects it by log magnitudes (`pulses`, `noise`) and
    a `phase`, `[B, F, 129]` each.
    """
    weights, offset = _bins_from_mels()
    level = frames @ weights + offset
    response = jnp.stack(
        [
            jnp.exp(level + pulses) * jax.lax.complex(jnp.cos(phase), jnp.sin(phase)),
            jax.lax.complex(jnp.exp(level + noise - 1.0), jnp.zeros_like(noise)),
        ],
        axis=2,
    )
    return jnp.roll(jnp.fft.irfft(response, TAPS), LEAD, axis=-1) * _tap_window()


def param_specs(cfg: VocoderConfig) -> SpecTable:
    """Returns the spec table: about 1.5 M parameters at the default sizes."""
    return specs(Vocoder(cfg))


def init_state(cfg: VocoderConfig, batch: int) -> VocoderState:
    """Returns the state before the first frame of `batch` sessions: silence, with pulses at phase zero.

    - `tails`: for each convolution, the last inputs, float32.
    - `hops`: `[B, 2, 2, 200]` float32, the last two hops of both sources.
    - `taps`: `[B, 2, 256]` float32, the filters at the end of the last hop.
    - `pitch`: `[B]` int32, the pitch there, in units of PITCH_GRID.
    - `phase`: `[B]` uint32, the phase there; a cycle is 2^32.
    - `frame`: `[B]` uint32, the number of frames so far, from which the noise is computed.
    """
    tails = {f"block{i}": jnp.zeros((batch, cfg.kernel - 1, cfg.width)) for i in range(cfg.depth)}
    # The embedding scales a log-mel of -2 to zero. A log-mel of -7, digital silence, becomes -10/3.
    tails["embed"] = jnp.full((batch, cfg.kernel - 1, N_MELS), -10.0 / 3.0, jnp.float32)
    return {
        "tails": tails,
        "hops": jnp.zeros((batch, 2, 2, FINE_HOP)),
        "taps": jnp.zeros((batch, 2, TAPS)),
        "pitch": jnp.full((batch,), round(PITCH_MIN / PITCH_GRID), jnp.int32),
        "phase": jnp.zeros((batch,), jnp.uint32),
        "frame": jnp.zeros((batch,), jnp.uint32),
    }


def predict_controls(
    cfg: VocoderConfig, params: Params, state: VocoderState, frames: jax.Array, known_hz: jax.Array | None = None
) -> tuple[dict[str, jax.Array], Controls]:
    """Runs the network alone.

    Args:
      cfg: the sizes.
      params: a nested dict of arrays, as in `param_specs`.
      state: from `init_state` or the call before.
      frames: `[B, F, 80]`, fine log-mels.
      known_hz: `[B, F]`, in training: the pitch of the recording, which replaces the network's own; 0 where unknown.

    Returns:
      The next tails, and the controls.
    """
    excess = _noise_excess(state["frame"], frames.shape[1])
    return bind(Vocoder(cfg), params)(state["tails"], frames, excess, known_hz)


def _white(frame: jax.Array, count: int) -> jax.Array:
    """Returns white noise of variance one, `[B, F, 200]`, for `count` frames from number `frame` `[B]` uint32 on.

    The noise is a pure function of a sample's number. The bits are mixed by MurmurHash3's 32-bit finaliser (Appleby,
    public domain), which takes ten integer operations per sample and has no state.
    """
    numbers = frame[:, None] + jnp.arange(count, dtype=jnp.uint32)
    bits = numbers[..., None] * jnp.uint32(FINE_HOP) + jnp.arange(FINE_HOP, dtype=jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    return (bits.astype(jnp.int32).astype(jnp.float32)) * np.float32(np.sqrt(3.0) / 2**31)


def _noise_excess(frame: jax.Array, count: int) -> jax.Array:
    """Returns by how much the noise source exceeds its mean level in each fine frame's window, log10, `[B, F, 80]`.

    50 ms of noise are uneven, by 5 dB in a narrow channel. The source is known in advance, future samples included. So
    the network can compensate for it, and a breath sounds as even as the recorded breath.
    """
    hops = _white(frame - jnp.uint32(2), count + 4)
    windows = jnp.concatenate([hops[:, k : k + count] for k in range(5)], axis=-1)[..., FINE_HOP // 2 :][
        ..., :FINE_WINDOW
    ]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FINE_WINDOW) / FINE_WINDOW)).astype(np.float32)
    filters = mel_filterbank(FINE_WINDOW)
    mels = jnp.abs(jnp.fft.rfft(windows * hann)) @ filters.astype(np.float32)
    mean = np.log10(filters.sum(axis=0) * np.sqrt(FINE_WINDOW * 3 / 8))
    return jnp.log10(jnp.maximum(mels, 1e-6)) - mean.astype(np.float32)


def _pulses(before: jax.Array, pitch: jax.Array, phase: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes a band-limited pulse train of variance one: all harmonics of the pitch, in phase.

    Args:
      before, pitch: `[B, F]` int32, the pitch at the start and at the end of each hop, in units of PITCH_GRID.
      phase: `[B]` uint32, the phase at the start of the first hop.

    Returns:
      The samples `[B, F, 200]`, and the phase after the last hop, `[B]` uint32.
    """
    advance = (before + pitch).astype(jnp.uint32) * jnp.uint32(_CYCLE)
    ends = phase[:, None] + jnp.cumsum(advance, axis=1, dtype=jnp.uint32)
    starts = jnp.concatenate([phase[:, None], ends[:, :-1]], axis=1)
    n = jnp.arange(1, FINE_HOP + 1, dtype=jnp.float32)
    f0, f1 = (PITCH_GRID / SAMPLE_RATE * p.astype(jnp.float32)[..., None] for p in (before, pitch))
    cycles = (starts >> 8).astype(jnp.float32)[..., None] * 2.0**-24 + f0 * n + (f1 - f0) * (n * n / (2 * FINE_HOP))
    cycles = cycles - jnp.round(cycles)
    harmonics = jnp.floor(_TOP_HZ / SAMPLE_RATE / jnp.maximum(f0, f1))
    # The sum of cos(2 pi k c) for k = 1..H in closed form (Dirichlet's kernel), and its limit at the pulse.
    low = jnp.sin(jnp.pi * cycles)
    near = jnp.abs(low) < 1e-4
    kernel = jnp.sin((2 * harmonics + 1) * jnp.pi * cycles) / jnp.where(near, 1.0, low)
    total = 0.5 * jnp.where(near, 2 * harmonics + 1, kernel) - 0.5
    return total * jnp.sqrt(2.0 / harmonics), ends[:, -1]


def render(state: VocoderState, hz: jax.Array, taps: jax.Array) -> tuple[VocoderState, jax.Array]:
    """Runs the two sources through the filters.

    Args:
      state: from `init_state` or the call before; its tails are not used.
      hz: `[B, F]`, the pitch at the ends of the hops; no gradient flows into it.
      taps: `[B, F, 2, 256]`, the filters at the ends of the hops.

    Returns:
      The next state without tails, and the waveform `[B, 200 F]`, 16 kHz float32.
    """
    count = hz.shape[1]
    pitch = jnp.round(jax.lax.stop_gradient(hz) / PITCH_GRID).astype(jnp.int32)
    before = jnp.concatenate([state["pitch"][:, None], pitch[:, :-1]], axis=1)
    pulses, phase = _pulses(before, pitch, state["phase"])
    sources = jnp.stack([pulses, _white(state["frame"], count)], axis=2)
    hops = jnp.concatenate([state["hops"], sources], axis=1)  # [B, F + 2, 2, 200]
    windows = jnp.concatenate([hops[:, k : k + count] for k in range(3)], axis=-1)[..., -_FFT:]
    spectra = jnp.fft.rfft(windows)  # [B, F, 2, 257]
    taps = jnp.concatenate([state["taps"][:, None], taps], axis=1)
    responses = jnp.fft.rfft(taps, _FFT)
    # A circular convolution wraps into the first TAPS - 1 samples of the window. The hop is the last 200 samples.
    both = jnp.stack([jnp.sum(spectra * responses[:, k : k + count], axis=2) for k in range(2)])
    old, new = jnp.fft.irfft(both, _FFT)[..., -FINE_HOP:]
    fade = jnp.arange(1, FINE_HOP + 1, dtype=jnp.float32) / FINE_HOP
    wave = old + fade * (new - old)
    after = {
        "hops": hops[:, count:],
        "taps": taps[:, -1],
        "pitch": pitch[:, -1],
        "phase": phase,
        "frame": state["frame"] + jnp.uint32(count),
    }
    return after, wave.reshape(wave.shape[0], count * FINE_HOP)


def vocode(
    cfg: VocoderConfig, params: Params, state: VocoderState, frames: jax.Array
) -> tuple[VocoderState, jax.Array]:
    """Turns any number of frames into sound; a micro-turn has 16 frames.

    Args:
      cfg: the sizes.
      params: a nested dict of arrays, as in `param_specs`.
      state: from `init_state` or the call before.
      frames: `[B, F, 80]`, fine log-mels (log10, from -7 to 2; `stream.dmel.fine_log_mel`); F >= 1.

    Returns:
      The next state, and the waveform `[B, 200 F]`, 16 kHz float32.
    """
    tails, controls = predict_controls(cfg, params, state, frames)
    after, wave = render(state, controls.hz, controls.taps)
    return {"tails": tails, **after}, wave
