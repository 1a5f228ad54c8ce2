from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options
from prunec.cli.evaluate import Text, Wanted, measure_model, show_comparison
from prunec.errors import ExportError, ModelError, PrunecError

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.evaluation import Evaluation
    from prunec.evaluation.page import Case, Measured, Picture
    from prunec.models import Source

PROMPTS = (
    "The most important thing to know about the ocean is",
    "Once upon a time, in a village by the river,",
    "To make a simple soup, first",
)
NEW_TOKENS = 60

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="The page.  [default: DIR/report.html]"),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The dense model.  [default: the one that DIR names]"),
]
Ppl = Annotated[
    Path | None, typer.Option("--ppl", metavar="FILE", help="Text to measure perplexity on.")
]
Window = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens a window of --ppl.  [default: 1024, or what the model reads]"),
]
MaxWindows = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Only the first N windows.")
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="A beginning for the models to continue; repeat for more."),
]
Figures = Annotated[
    Path | None,
    typer.Option(
        "--eval", metavar="FILE", help="What `prunec eval --json FILE` wrote, of the base and DIRs."
    ),
]
Measure = Annotated[bool, typer.Option(help="Open the models, to time them and let them write.")]


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that prunec wrote.")
    ],
    out: Out = None,
    base: Base = None,
    ppl: Ppl = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    prompt: Prompt = None,
    figures: Figures = None,
    measure: Measure = True,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page about a pruned model, to show around.

    What was asked and done, sizes by layer, errors, loss curves, before and after, samples of text,
    the coupling, and how to open it. It needs no network and runs no script.

    Example: prunec report smaller --ppl valid.txt --max-windows 40
    """
    target = out or directory / "report.html"
    _write(
        [directory], target, base, ppl, window, max_windows, prompt, figures,
        measure=measure, device=device, trust_remote_code=trust_remote_code, quiet=quiet,
    )  # fmt: skip


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories that prunec wrote.")
    ],
    out: Out = None,
    base: Base = None,
    ppl: Ppl = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    prompt: Prompt = None,
    figures: Figures = None,
    measure: Measure = True,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page that puts several pruned models beside each other.

    Example: prunec compare smaller smallest -o comparison.html --ppl valid.txt
    """
    _write(
        directories, out or Path("comparison.html"), base, ppl, window, max_windows, prompt,
        figures, measure=measure, device=device, trust_remote_code=trust_remote_code, quiet=quiet,
    )  # fmt: skip


def _write(
    directories: Sequence[Path],
    out: Path,
    base: str | None,
    ppl: Path | None,
    window: int | None,
    max_windows: int | None,
    prompts: Sequence[str] | None,
    figures: Path | None,
    *,
    measure: bool,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    from prunec.calibration import read_text
    from prunec.cli.console import Screen, check_file_target, write_text
    from prunec.cli.opening import open_measured
    from prunec.evaluation import Comparison
    from prunec.evaluation.page import build_page, read_case

    screen = Screen(quiet=quiet)
    opened = partial(
        open_measured, progress=screen, device=device, trust_remote_code=trust_remote_code
    )
    check_file_target(out, "-o")
    if ppl is not None:
        read_text(ppl)
    known = _read_figures(figures)
    cases = [read_case(directory) for directory in directories]
    texts = (Text(ppl, ppl.name, window),) if ppl else ()
    wanted = Wanted(texts=texts, max_windows=max_windows, speed=measure)
    name = base or _common_base(cases)
    missing: list[str] = []
    dense: Measured | None = None
    pictures: list[Picture] = []
    for spec, case in [(name, None), *zip(map(str, directories), cases, strict=True)]:
        if spec is None:
            missing.append("The dense model: the directories do not name one and the same.")
            continue
        source = None
        if measure or ppl:
            source = _open(opened, spec, missing, needed=case is not None)
        found = _measured(
            screen, case.name if case else spec, spec, source, wanted, known,
            prompts or PROMPTS if measure else (),
        )  # fmt: skip
        if case is None:
            dense = found
        else:
            cases[cases.index(case)] = read_case(Path(spec), measured=found)
        if source is not None and not pictures:
            pictures = _draw(screen, source, missing)
    shown = [m.evaluation for m in (dense, *(case.measured for case in cases)) if m]
    evaluations = tuple(evaluation for evaluation in shown if evaluation)
    page = build_page(cases, base=dense, pictures=pictures, missing=missing)
    try:
        write_text(out, page)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from error
    if evaluations:
        show_comparison(screen, Comparison(evaluations))
    screen.say(f"Written: {out}")


def _common_base(cases: Sequence[Case]) -> str | None:
    names = {case.record.get("base_model") for case in cases}
    found = names.pop()
    return str(found) if found and not names else None


def _open(
    opened: Callable[[str], Source], spec: str, missing: list[str], *, needed: bool
) -> Source | None:
    """A dense model that is no longer at hand is said in the page; a missing DIR is an error."""
    try:
        return opened(spec)
    except ModelError as error:
        if needed:
            raise
        missing.append(f"The dense model {spec}: {error.message}")
        return None


def _measured(
    screen: Screen,
    name: str,
    spec: str,
    source: Source | None,
    wanted: Wanted,
    known: dict[str, Evaluation],
    prompts: Sequence[str],
) -> Measured:
    from prunec.evaluation import Evaluation
    from prunec.evaluation.page import Measured

    given = known.get(spec)
    metrics = list(given.metrics) if given else []
    samples: dict[str, str] = {}
    if source is not None:
        found, _ = measure_model(screen, spec, source, wanted, None)
        old = {(metric.name, metric.how) for metric in metrics}
        metrics += [metric for metric in found.metrics if (metric.name, metric.how) not in old]
        with screen.task(f"continue prompts with {name}", len(prompts)) as task:
            for prompt in prompts:
                if (text := continuation(source, prompt)) is not None:
                    samples[prompt] = text
                task.advance()
    return Measured(name, Evaluation(name, tuple(metrics)) if metrics else None, samples)


def continuation(source: Source, prompt: str) -> str | None:
    """What a model makes of a prompt, greedily, as far as it reads; None if it writes none."""
    from prunec.models.context import context_length
    from prunec.models.generation import generates

    model: Any = source.model
    if source.tokenizer is None or not generates(model):
        return None
    inputs = source.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs, length = inputs.to(model.device), inputs["input_ids"].shape[1]
    count = min(NEW_TOKENS, (context_length(model) or math.inf) - length)
    if length == 0 or count < 1:
        return None
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    new = tokens[0, length:]
    return str(source.tokenizer.decode(new, skip_special_tokens=True)).strip()


def _draw(screen: Screen, source: Source, missing: list[str]) -> list[Picture]:
    """The whole model and its most frequent block."""
    import prunec
    from prunec.evaluation.page import Picture
    from prunec.graph.render import draw, render

    found = []
    try:
        with screen.task("draw the coupling"):
            coupling = prunec.couple(prunec.trace(source.model, source.example))
            for level, title in (("groups", "One block of"), ("blocks", "All of")):
                picture = draw(coupling, level)  # type: ignore[arg-type]
                svg = render(picture.source, "svg", picture.style).decode()
                found.append(Picture(f"{title} {source.spec}", svg[svg.index("<svg") :]))
    except PrunecError as error:
        missing.append(f"Pictures of the coupling: {error.message}")
    return found


def _read_figures(path: Path | None) -> dict[str, Evaluation]:
    """Evaluations by model, from the JSON of prunec eval."""
    from prunec.evaluation import Evaluation
    from prunec.models.checkpoint import NO_JSON

    if path is None:
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["model"]: Evaluation.from_json(entry) for entry in entries}
    except (OSError, *NO_JSON, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"cannot read the evaluation {path}: {error}",
            fix="give what `prunec eval ... --json FILE` wrote",
        ) from error
