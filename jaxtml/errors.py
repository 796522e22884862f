"""The one exception for bad input from a user.

Raised wherever something of the user's enters (a file, a flag, a config, a checkpoint); the command line turns it
into one line on stderr and exit status 2.
"""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do about it."""


MOST_NAMED = 5  # names listed in an error before "and N more"


def join_names(names: list[str]) -> str:
    """The first of them, and how many there are more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
