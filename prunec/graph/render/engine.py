"""Rendering DOT with the graphviz at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from prunec import staging
from prunec.errors import ExportError

TIMEOUT_SECONDS = 300


def find_engine() -> str:
    """The system's ``dot`` where there is one, else the program of the graphviz-pure package.

    Raises:
        ExportError: if there is neither.
    """
    found = shutil.which("dot")
    if found:
        return found
    beside = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
    for folders in (beside, None):
        found = shutil.which("graphviz-pure", path=folders)
        if found:
            return found
    raise ExportError(
        "there is no graphviz to draw with: neither a `dot` program nor graphviz-pure",
        fix="pip install graphviz-pure (or your system's graphviz), or write --dot or --html",
    )


def render(source: str, form: str = "svg", style: str = "") -> bytes:
    """Lay out a DOT source and draw it.

    Args:
        form: "svg" or "png".
        style: CSS to put into an SVG.

    Raises:
        ExportError: if there is no graphviz, or it fails.
    """
    command = [find_engine(), f"-T{form}"]
    try:
        run = subprocess.run(
            command,
            input=source.encode(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"graphviz failed: {error}", where=command[0]) from error
    if run.returncode or not run.stdout:
        reason = run.stderr.decode(errors="replace").strip() or "no reason given"
        raise ExportError(f"graphviz failed: {reason.splitlines()[0]}", where=command[0])
    return _styled(run.stdout.decode(), style).encode() if form == "svg" else run.stdout


def _styled(svg: str, style: str) -> str:
    """The bare ``<svg>`` element, with a style sheet of its own."""
    svg = svg[svg.index("<svg") :]
    return re.sub(r"(<svg[^>]*>)", rf"\1\n<style>{style}</style>", svg, count=1) if style else svg


def check_folder(path: Path) -> None:
    """Raises ExportError where a file could not be written: fail before the work, not after."""
    if not path.absolute().parent.is_dir():
        raise ExportError(f"no such directory: {path.parent}", where=str(path))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ExportError: if the directory does not exist or the disk refuses.
    """
    try:
        staging.write_whole(path, content)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
