"""The engines: programs that measure prunec's output but that prunec does not depend on.

A test that needs one is marked ``@pytest.mark.engine("onnxruntime")``. The summary lists each
engine as measured or absent; PRUNEC_REQUIRE_ENGINES=1 makes absence a failure.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import pytest

MODULES = {
    "llama-cpp-python": "llama_cpp",
    "onnxruntime": "onnxruntime",
    "lm-eval": "lm_eval",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}
PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome")}
ENGINES = (*MODULES, *PROGRAMS)


def present(engine: str) -> bool:
    if engine in MODULES:
        return find_spec(MODULES[engine]) is not None
    return any(shutil.which(program) for program in PROGRAMS[engine])


def required() -> bool:
    return os.environ.get("PRUNEC_REQUIRE_ENGINES") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("engine"):
        (engine,) = mark.args
        if not present(engine):
            pytest.skip(f"{engine} is absent: `make engines` installs it")
        # Travels with the report, from xdist's workers too.
        item.user_properties.append(("engine", engine))


def pytest_sessionfinish(session: pytest.Session) -> None:
    absent = [engine for engine in ENGINES if not present(engine)]
    if required() and absent and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    measured = {value for report in ran for key, value in report.user_properties if key == "engine"}
    terminalreporter.section("engines")
    for engine in ENGINES:
        state = "measured" if engine in measured else "present, not measured"
        if not present(engine):
            state = "ABSENT, but required" if required() else "absent"
        terminalreporter.line(f"{engine:<18}{state}")
