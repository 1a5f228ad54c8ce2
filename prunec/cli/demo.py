from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options
from prunec.cli.report import show_totals

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.evaluation import Perplexity, Speed
    from prunec.models import Source

MODEL = "smollm2"
RATIO = 0.2
SAMPLES, SEQ_LEN = 32, 512
WINDOW, WINDOWS = 1024, 8
TEXT = "pydoc_data.topics"
PROMPT = "The most important thing to know about the ocean is"
NEW_TOKENS = 40
SVG = "coupling.svg"


@dataclass(frozen=True)
class Measured:
    """One model as the demo's table shows it."""

    parameters: int
    size_bytes: int
    speed: Speed
    perplexity: Perplexity
    continuation: str

    def to_json(self) -> dict[str, Any]:
        speed, perplexity = vars(self.speed), vars(self.perplexity)
        return {**vars(self), "speed": speed, "perplexity": perplexity}


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="The directory to write.")
    ] = Path("prunec-demo"),
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Prune SmolLM2-135M by 20 % and compare.

    Takes minutes on two CPU cores and no data: the model samples its own calibration text.

    Example: prunec demo -o prunec-demo
    """
    import prunec
    from prunec.calibration import calibrate
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_source, save_result
    from prunec.codegen.directory import check_target
    from prunec.graph.render import draw, write_picture

    screen = Screen(quiet=quiet, json=json)
    check_target(out, overwrite=overwrite)
    dense = open_source(MODEL, screen)
    text = calibrate(
        ["self"],
        dense.tokenizer,
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        model=dense.model,
        progress=screen,
    )
    result = prunec.prune(dense.model, ratio=RATIO, calibration=text, progress=screen)
    save_result(result, out, dense, screen, overwrite=overwrite)
    pruned = open_source(str(out), screen)
    before = _measure(screen, "dense", dense)
    after = _measure(screen, "pruned", pruned)
    with screen.task("draw the coupling"):
        coupling = prunec.couple(prunec.trace(dense.model, dense.example))
        write_picture(draw(coupling), out / SVG)

    show_totals(screen, result.report)
    _compare(screen, before, after)
    screen.timings()
    screen.say(f"Written: {out} (the coupling of one block is drawn in {out / SVG})")
    screen.write_json(
        {"out": str(out), "dense": before.to_json(), "pruned": after.to_json()}
        | {"seconds": screen.seconds}
    )


def _measure(screen: Screen, name: str, source: Source) -> Measured:
    from prunec.evaluation import file_size, measure, parameter_count, perplexity

    model: Any = source.model
    with screen.task(f"time the {name} model"):
        speed = measure(model)
    with screen.task(f"continue a prompt with the {name} model"):
        continuation = _continue(model, source.tokenizer)
    return Measured(
        parameters=parameter_count(model),
        size_bytes=file_size(Path(model.name_or_path)),
        speed=speed,
        perplexity=perplexity(
            model,
            source.tokenizer,
            _english(),
            window=WINDOW,
            max_windows=WINDOWS,
            progress=screen,
        ),
        continuation=continuation,
    )


def _compare(screen: Screen, before: Measured, after: Measured) -> None:
    def row(name: str, figure: Callable[[Measured], float], form: str) -> list[str]:
        old, new = figure(before), figure(after)
        return [name, form.format(old), form.format(new), f"{new / old - 1:+.1%}"]

    protocol = after.perplexity
    screen.table(
        "SmolLM2-135M",
        ["", "before", "after", "change"],
        [
            row("parameters", lambda m: m.parameters, "{:,}"),
            row("size on disk, MB", lambda m: m.size_bytes / 1e6, "{:.1f}"),
            row("prefill of 512 tokens, ms", lambda m: m.speed.prefill_ms, "{:.0f}"),
            row("a new token, ms", lambda m: m.speed.decode_ms_per_token or 0.0, "{:.1f}"),
            row("peak memory, MB", lambda m: m.speed.peak_memory_bytes / 1e6, "{:.0f}"),
            row("perplexity", lambda m: m.perplexity.value, "{:.2f}"),
        ],
    )
    screen.say(
        f"Perplexity: {TEXT}, {protocol.windows} windows of {protocol.window} tokens, "
        f"stride {protocol.stride}. Times: {after.speed.threads} threads, fp32, medians."
    )
    screen.facts(PROMPT, [["before", before.continuation], ["after", after.continuation]])


def _english() -> str:
    """Text that every Python installation has, and that no calibration text here has seen."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _continue(model: Any, tokenizer: Any) -> str:
    """What the model makes of the prompt, greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text.removeprefix(PROMPT).strip()
