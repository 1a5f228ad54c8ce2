"""The model card: what was pruned, from what, how it measures, how to open it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from prunec.codegen.attributes import CONFIG
from prunec.codegen.shrink import Shrunk


def model_card(shrunk: Shrunk, metadata: Mapping[str, Any], auto: str) -> str:
    """README.md of the directory, with the front matter that the Hub reads."""
    base, custom = metadata.get("base_model"), shrunk.config.uniform is None
    parts = [
        _front_matter(base),
        f"# {base or type(shrunk.model).__name__}, pruned\n",
        _summary(shrunk, metadata.get("report") or {}),
        _loading(auto, shrunk.config.reason if custom else None),
        _sizes(shrunk),
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
    lines += ["| | before | after |", "|---|---|---|"]
    for name, (before, after) in table.items():
        was = f"{before:,}" if before else ""
        share = f" (-{1 - after / before:.1%})" if before else ""
        lines.append(f"| {name.replace('_', ' ')} | {was} | {after:,}{share} |")
    return "\n".join(lines) + "\n"


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
    text = (
        f"The stock class alone cannot be this model: {reason}. `modeling_prunec.py` gives it the "
        "sizes that `config.json` lists; it needs transformers and torch only. Where prunec is "
        'installed, `prunec.load("PATH")` opens it without `trust_remote_code`.\n'
    )
    return "\n".join([*lines, text])


def _sizes(shrunk: Shrunk) -> str:
    """One row a layer, of the fields that the config has for it, else of the module's numbers."""
    rows = dict(_rows(shrunk))
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not columns:
        return ""
    lines = ["## Sizes\n", f"| layer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for place, row in rows.items():
        lines.append(f"| {place} | {' | '.join(str(row.get(c, '')) for c in columns)} |")
    return "\n".join(lines) + "\n"


def _rows(shrunk: Shrunk) -> Iterator[tuple[str, dict[str, Any]]]:
    if shrunk.config.layers:
        yield from ((str(index), dict(row)) for index, row in shrunk.config.layers.items())
        return
    for path, values in shrunk.attributes.items():
        flat = {k: v for k, v in values.items() if k != "config"}
        flat |= {CONFIG + k: v for k, v in values.get("config", {}).items()}
        yield f"`{path}`", flat


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    lines = ["## Measured\n", "| | |", "|---|---|"]
    lines += [f"| {name} | {_shown(value)} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


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
