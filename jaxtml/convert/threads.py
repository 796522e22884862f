"""Runs the parts of a conversion, or of a verification, in threads. Called by the other modules of `convert`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


def run_in_threads(
    function: Callable[[Work, threading.Event], Result], work: Sequence[Work], workers: int | None = None
) -> list[Result]:
    """Returns `function(item, stop)` for each item of `work`, in order.

    The first exception ends all work: `stop` is set, and a function that sees this between two chunks raises
    `CancelledError`. When all functions have ended, the first exception is raised.

    Args:
      function: the function to call, in several threads at the same time.
      work: the items.
      workers: the number of threads; None takes two for each core, because about half of them wait for the disk.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        futures: list[Future[Result]] = [pool.submit(function, item, stop) for item in work]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
