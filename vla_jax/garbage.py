"""Python's garbage collector in programs that import much and trace models."""

import gc


def collect_rarely() -> None:
    """Look for garbage after 50 000 new objects, not 700; to be called before most is imported.

    What imports and traces make mostly stays, and is looked through again and again: by the default
    that is a tenth of the time in which a server starts.
    """
    gc.set_threshold(50_000, 20, 20)
