"""Time and memory of the process that calls, for the benchmarks."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Wall time and processor time in seconds."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


def give_memory_back() -> None:
    """Returns what the warm-up freed to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


class PeakMemory:
    """Peak resident size inside the context: the kernel's high-water mark, or samples where that cannot be reset."""

    def __enter__(self) -> PeakMemory:
        self.before = read_status("VmRSS")
        self.method = "VmHWM"
        try:
            Path("/proc/self/clear_refs").write_text("5")
            resettable = read_status("VmHWM") < self.before + (16 << 20)
        except (OSError, KeyError):
            resettable = False
        self._stop = threading.Event()
        self._sampled = self.before
        self._thread = None
        if not resettable:
            self.method = "sampling every 5 ms"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._sampled = max(self._sampled, read_status("VmRSS"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is None:
            self.peak = read_status("VmHWM")
        else:
            self._thread.join()
            self.peak = self._sampled


def read_status(key: str) -> int:
    """A size from /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def machine() -> dict[str, object]:
    """Processor, cores and load, to print beside results."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_average_at_end": round(os.getloadavg()[0], 2),
    }
