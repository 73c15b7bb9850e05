"""How fast a run is: what every row of the log says beside the losses."""

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Meter:
    """Wall time and data waiting between two rows of the log.

    Args:
        step: optimizer steps done so far.
        batch_size: samples a step.
        devices: of the mesh.
        flops: of one step over all devices, see `flops.of_step`; 0 = not counted.
        peak: operations a second of one device at its bf16 peak; None = not known.
    """

    def __init__(
        self,
        step: int,
        batch_size: int,
        devices: Sequence[Any] = (),
        flops: float = 0.0,
        peak: float | None = None,
    ):
        self._batch_size, self._devices, self._flops = batch_size, devices, flops
        self._peak = peak
        self._began = time.perf_counter()
        self._waited = 0.0
        self._step, self._since = step, self._began

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for a batch."""
        self._waited += seconds

    def expect(self, flops: float, peak: float | None) -> None:
        """Set a step's operations and a device's peak, once they are known; see the class."""
        self._flops, self._peak = flops, peak

    def read(self, step: int) -> dict[str, Any]:
        """Values of the steps since the last reading or pause, now that `step` is finished.

        Returns:
            "samples_per_s", "samples_per_s_per_device", "step_s", "data_wait" (share of the time),
            "tflops_per_device" (model TFLOP/s), "mfu" (see `flops`; None where the device's peak is
            not known), "rss_mb", "device_gb" (largest use of memory on one of this process's
            devices so far; None where the device does not tell), "wall_s" (since this process
            began to train).
        """
        # Two readings may fall into one tick of the clock.
        span = max(time.perf_counter() - self._since, 1e-9)
        steps = max(step - self._step, 1)
        # Without a list of devices all counts as one.
        devices = max(1, len(self._devices))
        speed = self._flops * steps / span / devices
        row = {
            "samples_per_s": self._batch_size * steps / span,
            "samples_per_s_per_device": self._batch_size * steps / span / devices,
            "step_s": span / steps,
            "data_wait": min(1.0, self._waited / span),
            "tflops_per_device": speed / 1e12,
            "mfu": speed / self._peak if self._peak else None,
            "rss_mb": rss_mb(),
            "device_gb": device_gb(self._devices),
            "wall_s": self._since + span - self._began,
        }
        self.pause(step)
        return row

    def pause(self, step: int) -> None:
        """Leave out what happened since the last reading (evaluation, saving)."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0


def rss_mb() -> float:
    """Resident memory of this process in MB; its peak where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # ru_maxrss is in bytes on macOS and in kilobytes on Linux.
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def device_gb(devices: Sequence[Any]) -> float | None:
    """Peak memory in use on the fullest of the local devices in GB; None if they do not tell."""
    # Devices of other processes cannot be asked.
    local_devices = [d for d in devices if d.process_index == d.client.process_index()]
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in local_devices]
    reported = [peak for peak in peaks if peak]
    return max(reported) / 1e9 if reported else None
