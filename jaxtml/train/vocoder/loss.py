"""What a vocoder's waveform is judged by: spectra at several resolutions, its fine log-mels, its pitch.

Multi-resolution STFT loss after Parallel WaveGAN (Yamamoto et al. 2020, arXiv:1910.11480): L1 of log magnitudes plus
spectral convergence; it does not ask for the recording's phase. Called by `train.vocoder.training`.

Axes: B rows, N samples, F frames, K FFT bins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.model.speech.vocoder import PITCH_OCTAVES, PITCH_STEPS
from jaxtml.stream.dmel import mel_filterbank
from jaxtml.stream.timebase import FINE_HOP, FINE_WINDOW, LOG_MEL_MIN

RESOLUTIONS = (1600, 800, 400, 240)  # samples of a window; the hop is a quarter. 100 ms sees harmonics, 15 ms onsets
_FLOOR = 1e-4  # of the power: about -86 dBFS, below which no difference is heard


def spectrum(wave: jax.Array, window: int, hop: int) -> jax.Array:
    """Hann power spectrum: `[B, N]` -> `[B, F, window // 2 + 1]`, whole windows only; `hop` divides `window` and N."""
    hops = wave.reshape(wave.shape[0], -1, hop)
    count = hops.shape[1] - window // hop + 1
    # Windows as neighbouring hops: a gather's gradient is a scatter, which XLA does slowly on CPU.
    frames = jnp.concatenate([hops[:, k : k + count] for k in range(window // hop)], axis=-1)
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)
    bins = jnp.fft.rfft(frames * hann)
    return jnp.square(bins.real) + jnp.square(bins.imag)


def stft_loss(wave: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L1 of natural log magnitudes, spectral convergence), each averaged over `RESOLUTIONS`; both waves `[B, N]`."""
    logs, convergence = [], []
    for window in RESOLUTIONS:
        hop = window // 4
        whole = wave.shape[1] // hop * hop
        ours, theirs = (jnp.maximum(spectrum(w[:, :whole], window, hop), _FLOOR) for w in (wave, target))
        logs.append(0.5 * jnp.mean(jnp.abs(jnp.log(ours) - jnp.log(theirs))))
        miss = jnp.sum(jnp.square(jnp.sqrt(ours) - jnp.sqrt(theirs)), axis=(1, 2))
        miss = jnp.sqrt(jnp.maximum(miss, 1e-8))  # both silent: a root's gradient at zero is not a number
        convergence.append(jnp.mean(miss / jnp.sqrt(jnp.sum(theirs, axis=(1, 2)))))
    return jnp.mean(jnp.stack(logs)), jnp.mean(jnp.stack(convergence))


def mel_loss(wave: jax.Array, target: jax.Array) -> jax.Array:
    """L1 of fine log-mels (log10), recomputed from both waves `[B, N]` on the same frames."""
    filters = mel_filterbank(FINE_WINDOW).astype(np.float32)

    def mels(x: jax.Array) -> jax.Array:
        magnitude = jnp.sqrt(jnp.maximum(spectrum(x, FINE_WINDOW, FINE_HOP), 1e-10))
        return jnp.log10(jnp.maximum(magnitude @ filters, 10.0 ** (LOG_MEL_MIN + 2)))

    return jnp.mean(jnp.abs(mels(wave) - mels(target)))


def pitch_loss(logits: jax.Array, octaves: jax.Array, voiced: jax.Array) -> jax.Array:
    """Cross-entropy, in nats above its least, of the pitch against a bell one class wide at the label, where voiced.

    Args:
      logits: `[B, F, 120]`.
      octaves: `[B, F]` log2 of Hz over `PITCH_MIN`.
      voiced: `[B, F]` 0 or 1.
    """
    place = octaves * (PITCH_STEPS / PITCH_OCTAVES) - 0.5
    bell = jax.nn.softmax(-0.5 * jnp.square(jnp.arange(PITCH_STEPS) - place[..., None]), axis=-1)
    miss = jnp.sum(bell * (jnp.log(bell + 1e-9) - jax.nn.log_softmax(logits)), axis=-1)
    return jnp.sum(miss * voiced) / jnp.maximum(jnp.sum(voiced), 1.0)
