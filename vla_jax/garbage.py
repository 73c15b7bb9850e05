"""Python's garbage collector in programs that import much and trace models."""

import gc

_USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """Look for garbage after 50 000 new objects, not 700; to be called before most is imported.

    What imports and traces make mostly stays, and is looked through again and again: by the default
    that is a tenth of the time in which a server starts.
    """
    gc.set_threshold(50_000, 20, 20)


def collect_as_usual() -> None:
    """Python's own thresholds again, for a program that from now on makes little that stays."""
    gc.set_threshold(*_USUAL)
