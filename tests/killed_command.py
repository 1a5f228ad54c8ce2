"""The command line in a process that is cheap to start, and to kill at any moment.

It is forked from one that has imported everything; so is the process of the acceptance gate, which
then is no stranger to prunec: what the gate proves is proven elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Modules that a run imports; transformers' are named, as it imports them when they are asked for.
PRELOADED = (
    "prunec.api",
    "prunec.cli.app",
    "prunec.pipeline.run",
    "prunec.calibration.sources",
    "prunec.codegen.acceptance",
    "torch.export._trace",
    "torch._inductor.codecache",
    "accelerate.hooks",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.integrations",
)


@dataclass(frozen=True)
class Run:
    """How a run of the command ended.

    Attributes:
        code: exit code; None if it was killed.
        seconds: from its start.
        said: what it wrote to stdout and stderr.
    """

    code: int | None
    seconds: float
    said: str

    @property
    def step(self) -> str:
        """The last of its outermost steps that had ended, as the command says it."""
        lines = [line for line in self.said.splitlines() if ": " in line]
        return lines[-1].partition(":")[0] if lines else "start"


def run(
    arguments: Sequence[str],
    log: Path,
    kill_after: float | None = None,
    file_limit: int = resource.RLIM_INFINITY,
) -> Run:
    """Run ``prunec`` with these arguments.

    Args:
        kill_after: seconds, after which it is killed with SIGKILL.
        file_limit: bytes that a file may have, as if the disk were full then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    given = (list(arguments), str(log), file_limit, dict(os.environ), str(Path.cwd()))
    process = context.Process(target=_command, args=given)
    process.start()
    assert process.pid is not None
    started = time.perf_counter()
    process.join(kill_after)
    killed = process.exitcode is None
    if killed:
        with suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    seconds = time.perf_counter() - started
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    return Run(None if killed else process.exitcode, seconds, said)


def _command(
    arguments: list[str], log: str, file_limit: int, environment: dict[str, str], folder: str
) -> None:
    os.setpgrp()
    os.environ.update(environment)  # the server has those of the first test
    os.chdir(folder)
    tempfile.tempdir = None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    from prunec.cli import main
    from prunec.codegen import gate

    gate.reopen = _reopen
    sys.argv = ["prunec", *arguments]
    main()


def _reopen(folders: Sequence[Path]) -> list[list[str]]:
    from prunec.codegen import acceptance, gate

    child = os.fork()
    if not child:
        os.chdir(folders[0])  # what is opened writes there, as the gate's own process does
        acceptance.main(list(folders))
        os._exit(0)
    os.waitpid(child, 0)
    return [gate._findings(folder / "findings.json", "it died") for folder in folders]
