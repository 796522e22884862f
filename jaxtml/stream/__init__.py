"""Turns sound, pictures and text into tokens and back, on a time base of 200 ms micro-turns.

A micro-turn is 200 ms of input and output. `timebase` has its sizes in samples and frames. `tokens` numbers the control
tokens. `layout` gives the order of the tokens inside a micro-turn.

`dmel` turns audio into dMel (log-mel frames in 16 levels), `images` turns pictures into patches, `text` turns text into
token ids, and `clock` turns times into features. `encoding` makes one sequence of a whole `conversation`, and
`decoding` reads the sequence back. `reading` reads the tokens of a live session.

`audio_file` and `video_file` read the files that users name. `audio_beginnings` finds where a recording begins,
`audio_parts` finds joined files and wrong headers, `audio_decoding` decodes, and `audio_level` notices what is hard to
hear.
"""
