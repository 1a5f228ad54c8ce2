from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.evaluation import Perplexity


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_DIR...", help="Models, in the order wanted.")
    ],
    ppl: Annotated[
        Path, typer.Option("--ppl", metavar="FILE", help="Text to measure perplexity on.")
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    max_windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N windows.")
    ] = None,
    json: options.Json = None,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of models on a text.

    All models see the same windows; the later ones are compared with the first.

    Example: prunec eval smollm2 smaller --ppl valid.txt --max-windows 40 --json -
    """
    from prunec.calibration import read_text
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_source
    from prunec.evaluation import parameter_count, perplexity

    screen = Screen(quiet=quiet, json=json)
    read_text(ppl)  # its errors come before the models open
    entries: list[dict[str, Any]] = []
    for spec in models:
        source = open_source(
            spec, screen, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        found = perplexity(
            source.model,
            source.tokenizer,
            ppl,
            window=window,
            max_windows=max_windows,
            progress=screen,
        )
        entries.append(_entry(spec, parameter_count(source.model), found))
    _show(screen, entries)
    screen.write_json(entries)


def _entry(spec: str, parameters: int, found: Perplexity) -> dict[str, Any]:
    measured = asdict(found)
    return {"model": spec, "perplexity": measured.pop("value"), **measured} | {
        "parameters": parameters
    }


def _show(screen: Screen, entries: list[dict[str, Any]]) -> None:
    first = entries[0]
    rows = [
        [
            entry["model"],
            f"{entry['parameters']:,}",
            f"{entry['perplexity']:.3f}",
            f"{entry['perplexity'] / first['perplexity']:.3f}",
        ]
        for entry in entries
    ]
    screen.table("Perplexity", ["model", "parameters", "perplexity", "to the first"], rows)
    screen.say(
        f"{first['data']}: {first['windows']} windows of {first['window']} tokens, "
        f"stride {first['stride']}, {first['tokens']:,} tokens scored."
    )
