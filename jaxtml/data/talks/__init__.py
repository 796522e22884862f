"""How single utterances become a conversation: timing, edits, the channel to the microphone."""
