"""The command line. Thin: it calls the public API and renders what comes back."""

from __future__ import annotations


def main() -> None:
    """Run the ``prunec`` command."""
    from prunec.cli.app import run

    run()
