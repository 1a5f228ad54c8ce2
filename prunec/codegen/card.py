"""The model card: what was pruned, from what, how it measures, how to open it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from prunec.codegen.attributes import CONFIG
from prunec.codegen.shrink import Shrunk


def model_card(shrunk: Shrunk, metadata: Mapping[str, Any], auto: str, *, custom: bool) -> str:
    """README.md of the directory, with the front matter that the Hub reads."""
    provenance = dict(metadata.get("provenance") or {})
    name = provenance.get("base_model") or type(shrunk.model).__name__
    parts = [
        _front_matter(provenance),
        f"# {name}, pruned\n",
        _summary(shrunk, provenance),
        _loading(auto, custom),
        _sizes(shrunk),
        _metrics(metadata.get("metrics") or {}),
        _recipe(metadata.get("recipe")),
        _limits(custom),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(provenance: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["prunec", "pruned"]}
    base = provenance.get("base_model")
    if base and str(base).count("/") <= 1 and not str(base).startswith((".", "/")):
        front |= {"base_model": base, "base_model_relation": "quantized"}
        front["base_model_relation"] = "finetune"
    if license_name := provenance.get("license"):
        front["license"] = license_name
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _summary(shrunk: Shrunk, provenance: Mapping[str, Any]) -> str:
    count = sum(p.numel() for p in shrunk.model.parameters())
    before = provenance.get("parameters")
    share = f", {1 - count / before:.1%} fewer than {before:,}" if before else ""
    return (
        f"{count:,} parameters{share}. Made with prunec: structured pruning, no sparse formats.\n"
    )


def _loading(auto: str, custom: bool) -> str:
    argument = ", trust_remote_code=True" if custom else ""
    lines = [
        "## Loading\n",
        "```python",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("PATH"{argument})',
        "```\n",
    ]
    if custom:
        lines.append(
            "The layers differ in size, which the stock config cannot say: `modeling_prunec.py` "
            "gives the stock class the sizes listed in `config.json`. It needs transformers and "
            "torch only. With prunec installed, `prunec.load(PATH)` needs no `trust_remote_code`.\n"
        )
    else:
        lines.append("All layers are alike: the stock class opens it, no code is shipped.\n")
    return "\n".join(lines)


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
