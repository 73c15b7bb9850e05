"""Large arrays that are handed out and come back by themselves.

A batch of images is tens of MB. Fresh memory of that size is mapped and zeroed by the kernel for
every batch, which costs a tenth of the decoding it is for.
"""

import threading
import weakref

import numpy as np
from jaxtyping import UInt8


class BufferPool:
    """uint8 arrays of one shape, reused once nobody holds them or a view of them any more."""

    def __init__(self, shape: tuple[int, ...]):
        """Makes arrays of `shape`, when they are first needed."""
        self._shape = shape
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self) -> UInt8[np.ndarray, "..."]:
        """An array with undefined content."""
        with self._lock:
            store = self._free.pop() if self._free else None
        if store is None:
            store = np.empty(self._shape, np.uint8)
        # Through a memoryview, so that `flat` owns no array numpy could see through: every view of
        # the result, however derived, then keeps `flat` alive, and jax does so while it reads.
        flat = np.frombuffer(store.data.cast("B"), np.uint8)
        # The finalizer takes no lock: it may run inside `take`, in the thread that holds it.
        weakref.finalize(flat, self._free.append, store).atexit = False
        return flat.reshape(self._shape)
