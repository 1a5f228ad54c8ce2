"""The model card: what was pruned, from what, how it measures, how to open it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from prunec.codegen.shrink import Shrunk
from prunec.codegen.twin import stock_class


def model_card(shrunk: Shrunk, metadata: Mapping[str, Any], auto: str) -> str:
    """README.md of the directory, with the front matter that the Hub reads."""
    base, custom = metadata.get("base_model"), shrunk.config.uniform is None
    parts = [
        _front_matter(base),
        f"# {base or stock_class(shrunk.model).__name__}, pruned\n",
        _summary(shrunk, metadata.get("report") or {}),
        _loading(auto, shrunk.config.reason if custom else None),
        _sizes(shrunk),
        _recovery(metadata.get("recovery") or {}),
        _metrics(metadata.get("metrics") or {}),
        _recipe(metadata.get("recipe")),
        _limits(custom),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base: Any) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["prunec", "pruned"]}
    if base and str(base).count("/") == 1 and not str(base).startswith((".", "/")):  # a Hub id
        front["base_model"] = str(base)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _summary(shrunk: Shrunk, report: Mapping[str, Any]) -> str:
    lines = ["Structured pruning by prunec: smaller dense matrices, no sparse format.\n"]
    count = sum(parameter.numel() for parameter in shrunk.model.parameters())
    table = {"parameters": report.get("parameters") or (None, count)}
    for name in ("block_parameters", "flops"):
        if report.get(name):
            table[name] = report[name]
    rows = []
    for name, (before, after) in table.items():
        share = f" (-{1 - after / before:.1%})" if before else ""
        was = f"{before:,}" if before else ""
        rows.append((name.replace("_", " "), was, f"{after:,}{share}"))
    return "\n".join([*lines, _table("Size", ["", "before", "after"], rows)])


def _loading(auto: str, reason: str | None) -> str:
    argument = "" if reason is None else ", trust_remote_code=True"
    lines = [
        "## Loading\n",
        "```python",
        f"from transformers import {auto}\n",
        f'model = {auto}.from_pretrained("PATH"{argument})',
        "```\n",
    ]
    if reason is None:
        return "\n".join([*lines, "The stock class opens it: no code is shipped.\n"])
    text = textwrap.fill(
        f"The stock class alone cannot be this model: {reason}. `modeling_prunec.py` gives it the "
        "sizes that `config.json` lists; it needs transformers and torch only. Where prunec is "
        'installed, `prunec.load("PATH")` opens it without `trust_remote_code`.',
        width=100,
        break_on_hyphens=False,
    )
    return "\n".join([*lines, text + "\n"])


def _sizes(shrunk: Shrunk) -> str:
    """One row a layer if the config has words for all sizes, else one a weight."""
    fields = shrunk.config
    if fields.layers and fields.whole:
        names = list(dict.fromkeys(name for row in fields.layers.values() for name in row))
        head: list[Any] = ["layer", *(f"{name} (was {fields.was[name]})" for name in names)]
        rows: list[list[Any]] = [
            [i, *(row.get(n, fields.was[n]) for n in names)] for i, row in fields.layers.items()
        ]
    else:
        head = ["weight", "was", "is"]
        rows = [
            [f"`{name}`", *(" x ".join(map(str, shape)) for shape in pair)]
            for name, pair in shrunk.sizes.items()
            if len(pair[0]) > 1
        ]
    return _table("Layers", head, rows) if rows else ""


def _table(title: str, head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"## {title}\n\n{body}\n"


def _recovery(recovery: Mapping[str, Any]) -> str:
    if not recovery:
        return ""
    settings = recovery["settings"]
    rows = [
        ("trained", f"{settings['train']}, {settings['objective']}"),
        ("data", f"{recovery['data']}, {recovery['tokens']:,} tokens"),
        ("steps", f"{recovery['steps']:,}"),
        ("held-out loss", f"{recovery['before']:.4f} before, {recovery['after']:.4f} after"),
    ]
    return _table("Recovery", ["", ""], rows)


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    return _table("Measured", ["", ""], [(n, _shown(value)) for n, value in metrics.items()])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _recipe(recipe: Any) -> str:
    if recipe is None:
        return ""
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
    return f"## Recipe\n\n```yaml\n{text.rstrip()}\n```\n\nThe units kept are in `plan.json`.\n"


def _limits(custom: bool) -> str:
    if not custom:
        return ""
    return (
        "## Limits\n\npeft prefix tuning assumes one number of KV heads for all layers and does "
        "not fit; LoRA does.\n"
    )
