"""The 200 ms time base, and the way between sound, pictures and text on one side and tokens on the other.

`timebase` has the sizes, `tokens` the numbers of control tokens, `layout` the order of a micro-turn. `dmel` turns audio
into dMel, `images` pictures into patches, `text` text into ids, `clock` times into features. `encoding` makes one
sequence of a whole `conversation`, `decoding` reads it back, `reading` reads the tokens of a live session. `audio_file`
and `video_file` read what users name.
"""
