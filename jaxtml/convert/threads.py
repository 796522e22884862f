"""Work in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any


def run_in_threads(one: Callable[[Any, threading.Event], Any], work: list[Any], workers: int | None) -> list[Any]:
    """`one` of each, by threads; the first exception ends it all, those under way at their next chunk."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        futures: list[Future[Any]] = [pool.submit(one, layer, stop) for layer in work]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
