"""Packages that bring plug-ins, installed for the length of a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunec import registry


@contextmanager
def installed(package: Path, folder: Path) -> Iterator[None]:
    """Inside, the package is installed in the folder and its entry points are found."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-index", "--no-build-isolation", "--target", folder, package),
        ],
        check=True,
    )
    sys.path.append(str(folder))
    registry._declared.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        registry._declared.cache_clear()
