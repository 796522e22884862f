"""The model listens to a recording, 200 ms at a time, and answers: `python examples/ten_lines.py`.

Prints what the model heard and said, and when. Writes the reply to reply.wav in the current folder. The first run
compiles for about fifteen seconds. For a recording of your own, put its path in place of `jaxtml.DEMO_RECORDING`.
"""

import jaxtml

model = jaxtml.load()
wave = jaxtml.read_audio(jaxtml.DEMO_RECORDING)
session = model.session(seed=0)
for start in range(0, len(wave) - 3199, 3200):
    turn = session.step(wave[start : start + 3200])
    if turn.heard or turn.text:
        print(f"{turn.t_ms / 1000:5.1f} s  {turn.gate:6}  heard: {turn.heard:12}  says: {turn.text}")
reply = model.converse(wave, seed=0)
jaxtml.write_wav("reply.wav", reply.wave)
