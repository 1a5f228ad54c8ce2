"""What a zoo run found: one JSON file, a Markdown table of types and one of operators."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from zoo.check import has_rule

Record = dict[str, Any]


def write(cache: Path, root: Path) -> None:
    """benchmarks/results/zoo.json, docs/zoo.md and docs/operators.md from the cached records."""
    records = [json.loads(file.read_text()) for file in sorted(cache.glob("*.json"))]
    results = root / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in r.items() if k not in ("sources", "config")} for r in records]
    (results / "zoo.json").write_text(json.dumps(kept, indent=1) + "\n")
    docs = root / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "zoo.md").write_text(types_table(records))
    (docs / "operators.md").write_text(operators_table(records))


def first_failure(record: Record) -> str:
    if record.get("reason"):
        return str(record["reason"])[:150]
    failures = record.get("failures") or []
    if not failures:
        return ""
    first = failures[0]
    what = first.get("error") or f"{first.get('difference'):.1e}"
    return f"{len(failures)} failures: {first['subject']} {first['way']} {what}"[:190]


def types_table(records: list[Record]) -> str:
    states = Counter(record["status"] for record in records)
    checks: Counter[str] = Counter()
    controls: Counter[str] = Counter()
    for record in records:
        checks.update({k: v for k, v in record.get("checks", {}).items() if k != "worst"})
        controls.update({k: v for k, v in record.get("controls", {}).items() if k != "missed"})
    lines = [
        "# The zoo",
        "",
        "Written by `make zoo`; do not edit. Tiny models with weights drawn at unit gain, in",
        "double precision. Per group: slicing equals masking (uniform, and ragged where companions",
        "allow it) and permuting units changes nothing; then all groups at once.",
        "",
        f"{len(records)} types: " + ", ".join(f"{n} {state}" for state, n in states.most_common()),
        "",
        f"{checks['exact']} checks exact within 1e-9, {checks['kept']} of them against "
        f"kept-count statistics, {checks['vacuous']} vacuous (removing the units moves nothing). "
        f"Wrong slices on purpose: {controls['caught']} of {controls['made']} caught; "
        f"{controls['inert']} more in weights that the output does not depend on.",
        "",
        "| type | status | groups | kinds | exact | kept-count | vacuous | wrong caught | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(record) for record in records)]) + "\n"


def _row(record: Record) -> str:
    checks, controls = record.get("checks", {}), record.get("controls", {})
    kinds = ", ".join(f"{n} {kind}" for kind, n in record.get("kinds", {}).items())
    note = first_failure(record)
    if not note and record.get("missing"):
        note = "no rule: " + ", ".join(record["missing"])
    caught = f"{controls.get('caught', 0)}/{controls.get('made', 0)}" if controls else ""
    cells = [
        record["type"],
        record["status"],
        record.get("groups", ""),
        kinds,
        checks.get("exact", ""),
        checks.get("kept", ""),
        checks.get("vacuous", ""),
        caught,
        note.replace("|", "/"),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def operators_table(records: list[Record]) -> str:
    calls: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for record in records:
        calls.update(record.get("operators", {}))
        types.update(record.get("operators", {}).keys())
    lines = [
        "# Operators",
        "",
        "Written by `make zoo` from the graphs of the zoo; do not edit. An operator without a rule",
        "is never guessed: every axis that it reads or writes is pinned.",
        "",
        "| operator | calls | types | rule |",
        "|---|---|---|---|",
    ]
    for operator, count in sorted(calls.items(), key=lambda item: (-item[1], item[0])):
        state = "yes" if "getitem" in operator or has_rule(operator) else "**none: pinned**"
        lines.append(f"| `{operator}` | {count} | {types[operator]} | {state} |")
    return "\n".join(lines) + "\n"
