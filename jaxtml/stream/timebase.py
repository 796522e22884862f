"""The 200 ms time base: every constant that relates samples, dMel frames, fine frames and micro-turns.

Everything counts in micro-turns of 200 ms of 16 kHz mono audio. The input of micro-turn `m` is the samples
`[3200 m, 3200 (m + 1))`. Its output is heard at the samples `[3200 (m + 1), 3200 (m + 2))`, because the model answers
after it has heard the whole input. Every part of the package imports its sizes from here. A trained model
depends on all of them.
"""

SAMPLE_RATE = 16_000  # Hz
MICRO_TURN_MS = 200
MICRO_TURN_SAMPLES = SAMPLE_RATE * MICRO_TURN_MS // 1000  # 3200

DMEL_HOP = 800  # samples, 50 ms
DMEL_WINDOW = 1600  # samples, 100 ms; the window ends with its hop, so it is causal
FRAMES_PER_MICRO_TURN = MICRO_TURN_SAMPLES // DMEL_HOP  # 4

FINE_HOP = 200  # samples, 12.5 ms
FINE_WINDOW = 800  # samples, 50 ms; the window is centred on its hop
FINE_PER_MICRO_TURN = MICRO_TURN_SAMPLES // FINE_HOP  # 16
FINE_PER_FRAME = DMEL_HOP // FINE_HOP  # 4

N_MELS = 80  # mel channels of a frame
N_BINS = 16  # levels of a dMel bin
LOG_MEL_MIN = -7.0  # log10 of the mel magnitude
LOG_MEL_MAX = 2.0
