"""What went wrong, in one line: turns an exception into what a user can do about it.

`jaxtml.commands.arguments.exit_status` calls `explain` at the edge of every command and tool. Our own checks raise
`InputError`, whose message is such a line already. Libraries raise errors of their own where a disk is full, memory is
short or another process is gone. These errors are recognised here. Every other exception is a fault of jaxtml.

Import nothing heavy here: every command line imports this module. So classes of JAX are recognised by their names.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator

from jaxtml.errors import InputError

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
LONGEST = 300  # characters of a library's text that a message repeats

_OS_ERRORS: dict[int, str] = {
    errno.ENOSPC: "the disk is full: free some space, or name a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or name a folder on another disk",
    errno.EFBIG: "a file would be larger than the limit: raise the limit with `ulimit -f`",
    errno.EROFS: "the file system is read-only: name a folder elsewhere",
    errno.EACCES: "permission denied: change its permissions, or name another file or folder",
    errno.EPERM: "not permitted: change its owner or permissions, or name another file or folder",
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EEXIST: "it exists already: name another file or folder",
    errno.EISDIR: "it is a folder, and a file is needed: name a file",
    errno.ENOTDIR: "a part of this path is a file, and a folder is needed: name another folder",
    errno.ENOTEMPTY: "the folder is not empty: empty it, or name another",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ELOOP: "its links lead in a circle: name another file or folder",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n`",
    errno.ENFILE: "the system has too many open files: end other programs",
    errno.EADDRINUSE: "another program uses this address: name another port",
    errno.EADDRNOTAVAIL: "this machine has no such address: name an address of this machine",
    errno.ENOMEM: "memory is used up: end other programs, or take a machine with more memory",
    errno.EIO: "reading or writing the disk failed: try again, or name a folder on another disk",
    errno.ESTALE: "the network file system lost this file: try again",
}
_DISK_FULL = re.compile(r"no space left on device", re.IGNORECASE)
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_OTHERS_GONE = re.compile(r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|coordination service|heartbeat")
_NO_BACKEND = re.compile(r"unable to initialize backend|unknown backend|No visible .* devices", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """Returns one line that says what is wrong and what to do; None if the error is a fault of jaxtml itself."""
    if isinstance(error, InputError):
        return _one_line(error)
    if isinstance(error, AssertionError):
        return _of_backend(error)
    for each in _chain(error):
        for explanation in _EXPLANATIONS:
            if line := explanation(each):
                return line
    return None


# Exceptions that come from mistakes in a program. Code that handles an error of a disk may make a mistake. The error of
# the disk is then the context of the mistake, and did not cause the mistake. So `_chain` stops at a mistake.
_MISTAKES = (AssertionError, AttributeError, LookupError, NameError, TypeError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, then the errors that caused it: libraries wrap the error of a disk in errors of their own.

    Libraries often wrap an error without `raise ... from`, so the context of their errors counts as a cause. Our code
    always wraps with `from`. Without `from`, an error that our code raises while it handles another error is a mistake
    in our code, and the other error is not yielded.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, _MISTAKES):
        seen.add(id(error))
        yield error
        has_context = not error.__suppress_context__ and not _raised_in(error).startswith(_PACKAGE)
        error = error.__cause__ or (error.__context__ if has_context else None)


def _of_system(error: BaseException) -> str | None:
    """Explains an error of the operating system by its number."""
    if not isinstance(error, OSError):
        return None
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    advice = _OS_ERRORS.get(error.errno or 0)
    if advice is None:
        return _one_line(error)
    return f"{' -> '.join(names)}: {advice}" if names else advice


def _of_full_disk(error: BaseException) -> str | None:
    """Explains the error of a library that reports a full disk in its text."""
    if not _DISK_FULL.search(str(error)):
        return None
    path = re.search(r"(/[^\s'\",:;\]]+)", str(error))
    return (f"{path[1]}: " if path else "") + _OS_ERRORS[errno.ENOSPC]


def _of_memory(error: BaseException) -> str | None:
    """Explains a device or a machine without enough memory."""
    if not isinstance(error, MemoryError) and not (_is_of_jax(error) and _NO_MEMORY.search(str(error))):
        return None
    asked = re.search(r"allocat\w* (?:of )?([\d.]+ ?\w+)", str(error))
    amount = f" for {asked[1]}" if asked else ""
    return (
        f"there is not enough memory{amount}: end other programs on the device, take a smaller batch or fewer sessions "
        "(in training: train.batch, train.accumulate, train.remat), or spread the work over more devices (--mesh)"
    )


def _of_other_processes(error: BaseException) -> str | None:
    """Explains errors of JAX after another process of the job ended or the network between them failed."""
    if not (_is_of_jax(error) and _OTHERS_GONE.search(str(error))):
        return None
    return (
        "lost the connection to the other processes of the job: look at what they print, then start all processes "
        f"again; a training run resumes from its newest checkpoint ({_one_line(error)[:LONGEST]})"
    )


def _of_backend(error: BaseException) -> str | None:
    """Explains that JAX has no device of the kind that the environment asks for.

    With JAX_PLATFORMS=cuda and no GPU, JAX ends at an assertion without text.
    """
    if isinstance(error, AssertionError) and _raised_in(error).endswith("xla_bridge.py"):
        name = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        return f"JAX has no such device here ({name}): unset JAX_PLATFORMS or set it to cpu"
    if not (isinstance(error, RuntimeError) and _NO_BACKEND.search(str(error))):
        return None
    return f"JAX has no such device here: unset JAX_PLATFORMS or set it to cpu ({_one_line(error)[:LONGEST]})"


def _of_missing_package(error: BaseException) -> str | None:
    """Explains that a package is missing on which jaxtml depends."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if not name or name.split(".")[0] == "jaxtml":
        return None
    return f"the Python package {name.split('.')[0]} is missing: install jaxtml and its dependencies into this Python"


_EXPLANATIONS: tuple[Callable[[BaseException], str | None], ...] = (
    _of_system,
    _of_full_disk,
    _of_memory,
    _of_other_processes,
    _of_backend,
    _of_missing_package,
)


def _raised_in(error: BaseException) -> str:
    """Returns the path of the file in which an error was raised; "" if it was raised nowhere."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _is_of_jax(error: BaseException) -> bool:
    """Returns whether JAX's runtime raised the error."""
    return any(kind.__name__ in ("JaxRuntimeError", "XlaRuntimeError") for kind in type(error).__mro__)


def _one_line(error: BaseException) -> str:
    """Returns the text of an error in one line, or the name of its class if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
