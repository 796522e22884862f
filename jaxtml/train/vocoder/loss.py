"""The loss terms of the vocoder: spectra at several resolutions, fine log-mels, and pitch.

The multi-resolution STFT loss follows Parallel WaveGAN (Yamamoto et al. 2020, arXiv:1910.11480): L1 of log magnitudes
plus spectral convergence. Phase is not compared. Called by `jaxtml.train.vocoder.training`.

Axes: B rows, N samples, F frames, K FFT bins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.model.speech.vocoder import PITCH_OCTAVES, PITCH_STEPS
from jaxtml.stream.dmel import mel_filterbank
from jaxtml.stream.timebase import FINE_HOP, FINE_WINDOW, LOG_MEL_MIN

# Samples of a window; the hop is a quarter of it. The longest, 100 ms, resolves harmonics; the shortest, 15 ms, onsets.
RESOLUTIONS = (1600, 800, 400, 240)
_FLOOR = 1e-4  # of the power: about -86 dBFS, below which no difference is audible


def power_spectrum(wave: jax.Array, window: int, hop: int) -> jax.Array:
    """Returns the Hann power spectrum of whole windows: `[B, N]` -> `[B, F, window // 2 + 1]`.

    `hop` divides `window` and N.
    """
    hops = wave.reshape(wave.shape[0], -1, hop)
    count = hops.shape[1] - window // hop + 1
    # A window is a few neighbouring hops. Gathering windows instead would make the gradient a scatter, which XLA does
    # slowly on a CPU.
    frames = jnp.concatenate([hops[:, k : k + count] for k in range(window // hop)], axis=-1)
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)
    bins = jnp.fft.rfft(frames * hann)
    return jnp.square(bins.real) + jnp.square(bins.imag)


def stft_loss(wave: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns L1 of natural log magnitudes and spectral convergence, each a mean over `RESOLUTIONS`.

    `wave` and `target` are `[B, N]`.
    """
    logs, convergence = [], []
    for window in RESOLUTIONS:
        hop = window // 4
        length = wave.shape[1] // hop * hop
        ours, theirs = (jnp.maximum(power_spectrum(w[:, :length], window, hop), _FLOOR) for w in (wave, target))
        logs.append(0.5 * jnp.mean(jnp.abs(jnp.log(ours) - jnp.log(theirs))))
        difference = jnp.sum(jnp.square(jnp.sqrt(ours) - jnp.sqrt(theirs)), axis=(1, 2))
        # Where both are silent the difference is 0, and the gradient of a square root at 0 is not finite.
        difference = jnp.sqrt(jnp.maximum(difference, 1e-8))
        convergence.append(jnp.mean(difference / jnp.sqrt(jnp.sum(theirs, axis=(1, 2)))))
    return jnp.mean(jnp.stack(logs)), jnp.mean(jnp.stack(convergence))


def mel_loss(wave: jax.Array, target: jax.Array) -> jax.Array:
    """Returns L1 of fine log-mels (log10), computed from both waves `[B, N]` on the same frames."""
    filters = mel_filterbank(FINE_WINDOW).astype(np.float32)

    def mels(x: jax.Array) -> jax.Array:
        magnitude = jnp.sqrt(jnp.maximum(power_spectrum(x, FINE_WINDOW, FINE_HOP), 1e-10))
        return jnp.log10(jnp.maximum(magnitude @ filters, 10.0 ** (LOG_MEL_MIN + 2)))

    return jnp.mean(jnp.abs(mels(wave) - mels(target)))


def pitch_loss(logits: jax.Array, octaves: jax.Array, voiced: jax.Array) -> jax.Array:
    """Returns the Kullback-Leibler divergence, in nats, between the labelled and the predicted distribution of pitch.

    The labelled distribution is a Gaussian bell over the `PITCH_STEPS` classes. It is centred on the labelled pitch and
    has a standard deviation of one class. The loss is a mean over voiced frames. It equals the cross-entropy minus the
    least value that the cross-entropy can have, so a perfect prediction costs 0.

    Args:
      logits: `[B, F, 120]`.
      octaves: `[B, F]`, log2(Hz / `PITCH_MIN`).
      voiced: `[B, F]`, 0 or 1.
    """
    place = octaves * (PITCH_STEPS / PITCH_OCTAVES) - 0.5
    bell = jax.nn.softmax(-0.5 * jnp.square(jnp.arange(PITCH_STEPS) - place[..., None]), axis=-1)
    divergence = jnp.sum(bell * (jnp.log(bell + 1e-9) - jax.nn.log_softmax(logits)), axis=-1)
    return jnp.sum(divergence * voiced) / jnp.maximum(jnp.sum(voiced), 1.0)
