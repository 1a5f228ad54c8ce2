"""How much memory this process has held at most."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """Resident bytes at their highest since the process began, or `forget_peak`.

    Not getrusage: its peak is also that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (highest,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(highest)


def forget_peak() -> None:
    """Count from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
