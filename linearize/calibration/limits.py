"""How much memory and disk there is: what the machine has free, and what limits this process."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from linearize.errors import DataError

UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
STATUS = Path("/proc/self/status")
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def parse_bytes(text: str) -> int:
    """`8GiB`, `500M`, `1.5g`, `4096`.

    Raises:
        DataError: it is no such amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise DataError(f"{text!r} is no amount of memory; write 8GiB, 500M or a number of bytes")
    return int(float(match[1]) * UNITS[match[2]])


def used_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The most that it has been since `reset_peak`, or since the start where that cannot be reset."""
    return _status("VmHWM") or _maxrss()


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # no Linux, or not allowed: the peak is the one since the start


def free_memory() -> int:
    """Bytes that this process can still take: of the machine's, its control group's, and its own limits (ulimit)."""
    found = [_machine(), *_groups(), *_own_limits()]
    known = [value for value in found if value is not None]
    return max(0, min(known)) if known else 2**62


def free_disk(folder: Path) -> int:
    """In the nearest folder that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _groups() -> list[int]:
    free = []
    for limit, usage in CGROUPS:
        try:
            most = Path(limit).read_text().strip()
            if most != "max" and int(most) < 2**60:
                free.append(int(most) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    return free


def _own_limits() -> list[int]:
    if sys.platform == "win32":
        return []
    import resource

    free = []
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            free.append(soft - _status(field))
    return free


def _status(field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _maxrss() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
