"""Libraries that announce, while they are imported, what no user of fluxq can act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, log lines up to warnings are dropped: bitsandbytes looks for kernels on a hub that only some processors
    would use.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
