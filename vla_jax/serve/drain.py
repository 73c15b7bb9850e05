"""Leaving in good order: what is being answered is answered, and then the server ends."""

import asyncio
import contextlib
from collections.abc import Iterator


class Drain:
    """The requests that are being answered.

    Attributes:
        begun: whether the server is ending: a connection closes behind its reply.
    """

    def __init__(self) -> None:
        self.begun = False
        self._count = 0
        self._idle = asyncio.Event()
        # Nothing is being answered yet, and a server that ends now must not wait.
        self._idle.set()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """From the moment a request is there until its reply has been sent."""
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def finish(self, seconds: float) -> int:
        """Wait for the replies, so long at most; returns how many requests are left then."""
        # Set before the wait, so that connections close behind the replies that are under way.
        self.begun = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._count
