"""Progress bars of long work, for terminals and for log files."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Tqdm's bar; where stderr is a file, as under Slurm, a line every `LOG_INTERVAL`.

    Args:
        iterable: what to go through; None = `update` it.
        options: tqdm's own, such as `total`, `desc` and `unit`.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    lines = "{l_bar}{bar:10}{r_bar}\n"
    # `delay` keeps work silent that is over before the first line is due.
    pace = {"delay": LOG_INTERVAL, "mininterval": LOG_INTERVAL, "bar_format": lines}
    return tqdm(iterable, **pace, **options)
