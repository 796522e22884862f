"""The 200 ms time base: every constant that relates samples, dMel frames, fine frames and micro-turns.

Everything counts in micro-turns of 200 ms of 16 kHz mono audio. The output of micro-turn `m`, whose input is samples
`[3200 m, 3200 (m + 1))`, is heard at samples `[3200 (m + 1), 3200 (m + 2))`: nothing is said before its input was
heard.
"""

SAMPLE_RATE = 16_000  # Hz
MICRO_TURN_MS = 200
MICRO_TURN_SAMPLES = SAMPLE_RATE * MICRO_TURN_MS // 1000  # 3200

DMEL_HOP = 800  # samples, 50 ms
DMEL_WINDOW = 1600  # samples, 100 ms, ends with its hop (causal)
FRAMES_PER_MICRO_TURN = MICRO_TURN_SAMPLES // DMEL_HOP  # 4

FINE_HOP = 200  # samples, 12.5 ms
FINE_WINDOW = 800  # samples, centred on its hop
FINE_PER_MICRO_TURN = MICRO_TURN_SAMPLES // FINE_HOP  # 16
FINE_PER_FRAME = DMEL_HOP // FINE_HOP  # 4

N_MELS = 80
N_BINS = 16
LOG_MEL_MIN = -7.0  # log10 magnitude
LOG_MEL_MAX = 2.0
