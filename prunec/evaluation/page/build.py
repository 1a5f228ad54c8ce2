"""The page itself: what is said of each model, in the order that a reader asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from prunec.evaluation.comparison import Comparison, Evaluation, Metric, shown
from prunec.evaluation.page.charts import bars, facts, layer_bars, lines, table
from prunec.evaluation.page.record import Case, Measured
from prunec.events import duration
from prunec.graph.render import palette

_SPEEDS = ("prefill", "a new token", "peak memory")
_LOSS = ("var(--muted)", "var(--c1)", "var(--c2)", "var(--c3)")


@dataclass(frozen=True)
class Picture:
    """A drawing of the coupling, as SVG."""

    title: str
    svg: str


def build_page(
    cases: Sequence[Case],
    *,
    base: Measured | None = None,
    pictures: Sequence[Picture] = (),
    missing: Sequence[str] = (),
) -> str:
    """The page as HTML that needs no network and no script.

    Args:
        cases: the pruned models, in the order wanted.
        base: the dense model, the first column of every comparison.
        pictures: of the coupling.
        missing: what could not be measured, and why.
    """
    one = cases[0] if len(cases) == 1 else None
    title = f"{one.name}: pruned by prunec" if one else f"{len(cases)} pruned models compared"
    everything: list[tuple[str, str]] = [
        ("Asked and done", "".join(_asked(case, titled=one is None) for case in cases)),
        ("Before and after", _comparison(cases, base)),
        ("Speed and memory", _speed(cases, base)),
        ("What each layer kept", "".join(_layers(case, titled=one is None) for case in cases)),
        ("Error per layer", _errors(cases)),
        ("Removal curves", _curves(cases)),
        ("Recovery", _recoveries(cases)),
        ("In their own words", _samples(cases, base)),
        ("What goes together", "".join(_picture(picture) for picture in pictures)),
        ("How to open it", "".join(_opening(case) for case in cases)),
        ("Recipe and versions", "".join(_recipe(case, titled=one is None) for case in cases)),
        ("Not measured", "".join(f"<p>{escape(line)}</p>" for line in missing)),
    ]
    sections = [(name, body) for name, body in everything if body]
    parts = {
        "@TITLE@": escape(title),
        "@LEAD@": escape(_lead(one)) if one else escape(", ".join(case.name for case in cases)),
        "@TILES@": _tiles(one, base) if one else "",
        "@CONTENTS@": "".join(f'<a href="#{_anchor(n)}">{escape(n)}</a>' for n, _ in sections),
        "@SECTIONS@": "".join(
            f'<section id="{_anchor(n)}"><h2>{escape(n)}</h2>{body}</section>'
            for n, body in sections
        ),
    }
    page = files("prunec.evaluation.page").joinpath("page.html").read_text(encoding="utf-8")
    for mark, content in parts.items():
        page = page.replace(mark, content)
    return page


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _lead(case: Case) -> str:
    base = case.record.get("base_model") or "a dense model"
    said = f"{base}, structurally pruned: smaller dense matrices that transformers opens as it is."
    return f"{said} Then trained on {case.recovery['data']}." if case.recovery else said


def _tiles(case: Case, base: Measured | None) -> str:
    """The few figures that people look for first."""
    tiles = []
    if sizes := case.report.get("parameters"):
        tiles.append(("parameters", _short(sizes[1]), f"of {_short(sizes[0])}"))
    if "realised_ratio" in case.report:
        share = f"{case.report['realised_ratio']:.1%}"
        tiles.append(("of the blocks removed", share, _asked_ratio(case)))
    for name in ("perplexity", "prefill", "a new token", "peak memory"):
        metric = _find(case.measured.evaluation, name)
        if metric is not None:
            before = _find(base.evaluation if base else None, metric.name)
            plain = Metric(metric.name, metric.value, None, metric.unit, metric.higher_is_better)
            old = f"was {shown(_without_error(before))}" if before else ""
            tiles.append((metric.name, shown(plain), old))
    cells = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _asked_ratio(case: Case) -> str:
    ratio = case.report.get("ratio")
    return f"asked: {ratio:.1%}" if ratio is not None else ""


def _without_error(metric: Metric) -> Metric:
    return Metric(metric.name, metric.value, None, metric.unit, metric.higher_is_better)


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,.0f}"


def _find(evaluation: Evaluation | None, name: str) -> Metric | None:
    metrics = evaluation.metrics if evaluation else ()
    return next((metric for metric in metrics if metric.name.startswith(name)), None)


def _titled(case: Case, body: str, titled: bool) -> str:
    return f"<h3>{escape(case.name)}</h3>{body}" if titled and body else body


def _asked(case: Case, *, titled: bool) -> str:
    report, record = case.report, case.record
    recipe = report.get("recipe") or {}
    rows = [
        ("model", str(record.get("base_model") or "not recorded")),
        ("recipe", f"{recipe.get('name', 'an explicit plan')}: {recipe.get('summary', '')}"),
    ]
    if recipe.get("paper"):
        rows.append(("paper", str(recipe["paper"])))
    if report.get("ratio") is not None:
        said = f"{report['ratio']:.1%} of the repeated blocks' parameters; it came to "
        rows.append(("asked for", f"{said}{report['realised_ratio']:.2%}"))
    for name, words in (
        ("block_parameters", "block parameters"),
        ("parameters", "all parameters"),
        ("flops", "FLOPs of a pass"),
    ):
        if report.get(name):
            before, after = report[name]
            rows.append((words, f"{before:,} to {after:,} (-{1 - after / before:.1%})"))
    calibration = report.get("calibration") or {}
    if sources := calibration.get("sources"):
        rows.append(("calibrated on", "; ".join(map(_source, sources))))
    if seconds := sum((report.get("seconds") or {}).values()):
        rows.append(("pruning took", duration(seconds)))
    if checks := record.get("checks"):
        rows.append(("proven by", f"{len(checks)} comparisons with a reference, the last in a "
                     "fresh process without prunec"))  # fmt: skip
    if skipped := report.get("skipped"):
        reasons = dict.fromkeys(item["reason"] for item in skipped)
        rows.append(("left whole", f"{len(skipped)} groups: {'; '.join(reasons)}"))
    return _titled(case, facts(rows), titled)


def _source(source: Mapping[str, Any] | str) -> str:
    """A calibration source in words, as older records have it already."""
    if isinstance(source, str):
        return source
    tokens = f", {source['tokens']:,} tokens" if source["tokens"] else ""
    return f"{source['name']} ({source['samples']:,} samples{tokens})"


def _comparison(cases: Sequence[Case], base: Measured | None) -> str:
    everyone = [*([base] if base else []), *(case.measured for case in cases)]
    found = [measured.evaluation for measured in everyone if measured.evaluation]
    if not found:
        return ""
    comparison = Comparison(tuple(found))
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes())
    return table(comparison.head, comparison.rows()) + f'<ul class="notes">{notes}</ul>'


def _speed(cases: Sequence[Case], base: Measured | None) -> str:
    everyone = [*([base] if base else []), *(case.measured for case in cases)]
    charts = []
    for name in _SPEEDS:
        rows = [
            (measured.name, metric.value, shown(metric))
            for measured in everyone
            if (metric := _find(measured.evaluation, name))
        ]
        if rows:
            charts.append(bars(name, rows))
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _layers(case: Case, *, titled: bool) -> str:
    charts = [
        layer_bars(kind.replace("_", " ") + "s", kept, palette.paint(kind).line)
        for kind, kept in case.kept.items()
    ]
    return _titled(case, "".join(charts), titled)


def _errors(cases: Sequence[Case]) -> str:
    """The error of every site, over the sites in order, a line a kind of site."""
    charts = []
    for case in cases:
        series: dict[str, list[tuple[float, float]]] = {}
        for site in case.report.get("sites", []):
            if site.get("error") is not None:
                name = site["site"].rpartition(".")[2]
                points = series.setdefault(name, [])
                points.append((float(len(points)), 100 * float(site["error"])))
        title = "Squared error of each site's output, per cent of its energy"
        prefix = f"{case.name}: " if len(cases) > 1 else ""
        charts.append(lines(prefix + title, series, x="layer", y="%"))
    return "".join(charts)


def _curves(cases: Sequence[Case]) -> str:
    """What removing more would have cost, of a few sites from first to last."""
    charts = []
    for case in cases:
        sites = [site for site in case.report.get("sites", []) if site.get("curve")]
        chosen = dict.fromkeys(round(i * (len(sites) - 1) / 4) for i in range(5) if sites)
        series = {
            site["site"]: [(100 * n / site["parameters"], 100 * loss) for n, loss in site["curve"]]
            for site in map(sites.__getitem__, chosen)
        }
        prefix = f"{case.name}: " if len(cases) > 1 else ""
        charts.append(
            lines(
                f"{prefix}Error of a site's output by how much of it goes",
                series,
                x="% of the site's parameters",
                y="% of energy",
            )
        )
    return "".join(charts)


def _recoveries(cases: Sequence[Case]) -> str:
    recovered = [case for case in cases if case.recovery]
    if not recovered:
        return ""
    several = len(cases) > 1
    told = "".join(_recovery(case, titled=several) for case in recovered)
    held = {
        case.name if several else "held out": [
            (point["seconds"] / 60, point["loss"]) for point in case.recovery["held_out_losses"]
        ]
        for case in recovered
    }
    return told + lines("Held-out loss by the minute", held, x="minutes", y="nats a token")


def _recovery(case: Case, *, titled: bool) -> str:
    found = case.recovery
    settings = found["settings"]
    rows = [
        ("trained", f"{found['parameters']:,} parameters: {settings['train']}, "
         f"{settings['objective']}"),
        ("data", f"{found['data']}: {found['tokens']:,} tokens, {found['held_out']} of "
         f"{found['rows']} rows held out"),
        ("for", f"{found['steps']:,} steps, {duration(found['seconds'])}"),
        ("held-out loss", f"{found['before']:.4f} before, {found['after']:.4f} after, in nats a "
         "token" + ("" if found["improved"] else ": it did not get better, so nothing changed")),
    ]  # fmt: skip
    training = [(point["step"], point["loss"]) for point in found["training"]]
    held = [(point["step"], point["loss"]) for point in found["held_out_losses"]]
    chart = lines(
        "Loss by the step",
        {"training": training, "held out": held},
        x="steps",
        y="nats a token",
        colours=_LOSS,
    )
    return _titled(case, facts(rows) + chart, titled)


def _samples(cases: Sequence[Case], base: Measured | None) -> str:
    everyone = [*([base] if base else []), *(case.measured for case in cases)]
    prompts = dict.fromkeys(prompt for measured in everyone for prompt in measured.samples)
    blocks = []
    for prompt in prompts:
        said = "".join(
            f"<div><h4>{escape(measured.name)}</h4><p>{escape(measured.samples[prompt])}</p></div>"
            for measured in everyone
            if prompt in measured.samples
        )
        blocks.append(
            f'<h3 class="prompt">{escape(prompt)}</h3><div class="grid said">{said}</div>'
        )
    note = '<p class="notes">Greedy continuations, as they come.</p>' if blocks else ""
    return note + "".join(blocks)


def _picture(picture: Picture) -> str:
    return (
        f'<figure class="picture"><figcaption>{escape(picture.title)}</figcaption>'
        f'<div class="wide">{picture.svg}</div></figure>'
    )


def _opening(case: Case) -> str:
    if case.code:
        note = (
            "Its layers differ in size, so the directory ships one generated file that needs "
            "transformers and torch only. With prunec installed, prunec.load opens it without it."
        )
    elif "plain" in case.record:
        note = "torch alone runs it. README.md in the directory says how its class comes back."
    else:
        note = "The stock class opens it: no code is shipped."
    return f"<pre>{escape(case.opening)}</pre><p>{note}</p>"


def _recipe(case: Case, *, titled: bool) -> str:
    record = case.record
    rows = [
        (name, str(record[name])) for name in ("prunec", "torch", "transformers") if name in record
    ]
    if digest := (case.report.get("calibration") or {}).get("digest"):
        rows.append(("calibration, sha256", str(digest)))
    if "seed" in case.report:
        rows.append(("seed", str(case.report["seed"])))
    parts = [facts(rows)]
    for name, data in (
        ("pruning", case.report.get("recipe")),
        ("recovery", case.recovery.get("settings")),
    ):
        if data:
            text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=80)
            parts.append(f"<h4>{name}</h4><pre>{escape(text.rstrip())}</pre>")
    return _titled(case, "".join(parts), titled)
