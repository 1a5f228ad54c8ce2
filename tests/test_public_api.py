from __future__ import annotations

import subprocess
import sys

import pytest

import prunec


def test_the_public_names_are_these() -> None:
    assert prunec.__all__ == [
        "CouplingGraph",
        "Plan",
        "Program",
        "Result",
        "apply_plan",
        "check",
        "couple",
        "errors",
        "export",
        "load",
        "prune",
        "register",
        "trace",
    ]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        prunec.prnue  # noqa: B018


def test_importing_prunec_and_its_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, prunec, prunec.registry, prunec.events, prunec.cli.app\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", prunec.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    assert getattr(prunec, name).__doc__
