"""Python's cyclic collector, kept still while a data file becomes many small objects.

Every row is a handful of lists and tuples, none of them in a cycle. The collector counts them all
and would walk the whole process, torch and transformers included, again and again to free nothing:
a third of the time of tokenising.
Source: https://docs.python.org/3/library/gc.html#gc.disable
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold the cyclic collector back for a block, or as a decorator for a function.

    Objects whose last reference goes are still freed at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
