"""Speech engines, the list of their voices, and utterances with the times of their words."""
