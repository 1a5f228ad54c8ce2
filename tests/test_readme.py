"""The README's commands and code are ones that work."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from tiny_model import write_tiny_llama

from prunec.cli.app import app

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for line in TEXT.splitlines()
    if line.startswith("    prunec ") and "/" not in line.split()[1]
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("prunec/")])
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)


def test_the_readme_shows_every_way_to_begin() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {"trace", "analyze", "prune", "eval"}


def test_make_has_the_targets_of_the_readme() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tables_of_the_readme_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    cells = importlib.import_module("cells")
    for samples, seq_len, windows in ((32, 512, 20), (128, 1024, 40)):
        protocol = cells.Protocol("smollm2", samples, seq_len, 1024, windows)
        table = cells.markdown(cells.Table(protocol))
        assert table.count("\n") > 5
        assert table in TEXT, protocol.name
    paired = cells.differences(cells.Table(cells.Protocol("smollm2", 32, 512, 1024, 20)), "auto")
    assert paired in (README.parent / "docs" / "comparison.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    for written, here in (('"smollm2"', repr(str(model))), ("=64, seq_len=512", "=4, seq_len=32")):
        assert written in code
        code = code.replace(written, here)
    names: dict[str, object] = {}
    exec(code, names)
    sizes = [
        sum(weight.numel() for weight in module.parameters())
        for module in (names["source"].model, names["result"].model, names["model"])
    ]
    assert sizes[0] > sizes[1] == sizes[2]
