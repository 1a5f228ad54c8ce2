"""What an exporter is, and the steps that every export goes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from prunec.codegen.directory import require_space, staged, staged_file
from prunec.codegen.exporters.source import ModelDirectory
from prunec.contract import Contract
from prunec.errors import ExportError
from prunec.events import Progress, silent
from prunec.models.quiet import quiet
from prunec.passes.recipe import Part

# that OUT must not have by mistake
_SUFFIXES = frozenset({".pt2", ".onnx", ".gguf", ".py", ".safetensors", ".json"})


@dataclass(frozen=True)
class Finding:
    """What came of opening the exported file in its engine.

    Attributes:
        engine: name and version, or the name alone where it is absent.
        state: whether the file was run there.
        detail: what was compared and how far apart it was, or how to get the engine.
    """

    engine: str
    state: Literal["measured", "engine absent"]
    detail: str


@dataclass(frozen=True)
class Exported:
    """A delivered export.

    Attributes:
        to: name of the exporter.
        out: the file, or the directory.
        files: names and bytes of what is in it.
        notes: what a user should know of this file, such as dimensions that are fixed.
        finding: the comparison in the engine.
    """

    to: str
    out: str
    files: dict[str, int]
    notes: tuple[str, ...]
    finding: Finding

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Exporter(Protocol):
    """One form that a model can be written in; a plug-in of the group ``exporters``.

    Attributes:
        file: name of the main file.
        alone: whether that file needs no other, so that OUT may be its name.
    """

    @property
    def file(self) -> str: ...

    @property
    def alone(self) -> bool: ...

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        """Why this form cannot hold the model; nothing if it can."""

    def needed_bytes(self, source: ModelDirectory) -> int:
        """Of disk, for the weights that `write` and `check` will have in the folder."""

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        """Write the files into an empty folder; notes for the user.

        Raises:
            ExportError: a package or resource is missing.
        """

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """Run the file in its engine, where that is installed, and compare with the model.

        Raises:
            VerifyError: the file is not the model.
        """


def export(
    directory: str | Path,
    to: str,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a directory of `Result.save`, or any transformers directory, in another form.

    Args:
        to: name of an exporter: pt2, python, onnx, gguf, padded, deci, or that of a plug-in.
        out: the file to write, if it ends as the form's file does (``.pt2``), else a directory.
        settings: of the exporter, such as ``{"type": "q8_0"}`` of gguf.
        overwrite: replace `out`, once the new one is proven.

    Raises:
        PluginError: no such exporter, or one that fails.
        PlanError: no such setting of it.
        ModelError: `directory` cannot be opened.
        ExportError: the form cannot hold the model, or `out` cannot be written.
        VerifyError: the file is not the model; nothing is delivered.
    """
    exporter = _exporter(to, settings or {})
    source = ModelDirectory.read(Path(directory))
    _check_apart(source.path, Path(out))
    with _place(exporter, to, Path(out), overwrite=overwrite) as folder, quiet():
        with progress.task(f"see whether {to} can hold it"):
            reasons = list(exporter.can_express(source))
        if reasons:
            raise ExportError(
                f"{to} cannot hold this model",
                where="; ".join(reasons[:8]),
                so="nothing was written",
                fix="export it to pt2, python or onnx, which hold any sizes",
            )
        require_space(folder, exporter.needed_bytes(source))
        with progress.task(f"write {to}"):
            notes = exporter.write(source, folder)
        with progress.task("compare it with the model"):
            finding = exporter.check(source, folder)
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return Exported(to, str(out), files, tuple(notes), finding)


def _exporter(name: str, settings: Mapping[str, Any]) -> Exporter:
    held = Contract(Exporter, {"can_express": Sequence, "write": Sequence, "check": Finding})
    return cast(Exporter, Part(name, settings).build("exporters", held))


def _check_apart(directory: Path, out: Path) -> None:
    """Refuse an OUT whose place the model itself has, or lies in."""
    model = directory.resolve()
    if out.resolve() in (model, *model.parents):
        raise ExportError(
            "the output would replace the model itself",
            where=str(out),
            so="nothing was written",
            fix="name another place",
        )


@contextmanager
def _place(exporter: Exporter, to: str, out: Path, *, overwrite: bool) -> Iterator[Path]:
    suffix = Path(exporter.file).suffix
    is_file = exporter.alone and out.suffix == suffix
    if out.suffix in _SUFFIXES and not is_file:
        or_file = f", or a file that ends in {suffix}" if exporter.alone else ""
        raise ExportError(f"{out.name} is no name for {to}", fix=f"name a directory{or_file}")
    if is_file:
        with staged_file(out, inside=exporter.file, overwrite=overwrite) as folder:
            yield folder
        return
    with staged(out, overwrite=overwrite, holds=exporter.file) as folder:
        yield folder
