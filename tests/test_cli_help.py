from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = ("trace", "analyze", "prune", "recover", "report", "compare", "eval", "demo", "recipes")
PRUNEC = str(Path(sys.executable).with_name("prunec"))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PRUNEC, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_lists_the_commands_within_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
        assert "\x1b" not in result.stdout
        assert all(f"  {command} " in result.stdout for command in COMMANDS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does_with_an_example(command: str) -> None:
    result = run(command, "--help", COLUMNS="200")
    assert result.returncode == 0
    assert f"Example: prunec {command}" in result.stdout


def test_no_command_shows_the_help() -> None:
    result = run()
    assert "Usage: prunec" in result.stdout + result.stderr


def test_the_version_is_the_packages() -> None:
    import prunec

    assert run("--version").stdout == f"prunec {prunec.__version__}\n"


def test_the_module_runs_as_the_command_does() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prunec", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("prunec ")


def test_a_wrong_option_is_a_usage_error_without_a_traceback() -> None:
    result = run("prune", "--no-such-option")
    assert result.returncode == 2
    assert "No such option" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_shell_is_offered_completion() -> None:
    result = run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 0
    assert "_PRUNEC_COMPLETE" in result.stdout
