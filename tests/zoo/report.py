"""What a zoo run found: one JSON file, a Markdown table of types and one of operators."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo import configs
from zoo.check import has_rule

Record = dict[str, Any]
TITLES = {
    "causal": "Causal language models",
    "encoder": "Encoders",
    "seq2seq": "Encoder-decoders",
    "vision": "Vision",
    "audio": "Audio",
    "vlm": "Vision-language, the vision tower kept",
    "image": "Vision-language, both towers pruned",
}


def write(cache: Path, root: Path, digests: Mapping[str, str]) -> None:
    """benchmarks/results/zoo.json, docs/zoo.md and docs/operators.md from the cached records.

    Args:
        digests: of the present sources, by step: records of others are counted as stale.

    Raises:
        LookupError: the files tell of types that have no record here; nothing is written.
    """
    records = {step: _records(cache / step) for step in digests}
    results = root / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    if lost := _told(results / "zoo.json", digests) - {(s, n) for s in records for n in records[s]}:
        raise LookupError(f"{len(lost)} records of zoo.json are not in {cache}: examine them first")
    kept = {step: [_kept(record) for record in found.values()] for step, found in records.items()}
    (results / "zoo.json").write_text(json.dumps(kept, indent=1) + "\n")
    docs = root / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "zoo.md").write_text(types_page(records["examine"], records["deliver"], digests))
    (docs / "operators.md").write_text(operators_table(list(records["examine"].values())))


def _told(file: Path, steps: Iterable[str]) -> set[tuple[str, str]]:
    """The steps and types that are still known, of which a file of results tells."""
    if not file.is_file():
        return set()
    told, known = json.loads(file.read_text()), set(configs.all_types("all"))
    types = {(step, record["type"]) for step in steps for record in told.get(step, ())}
    return {(step, name) for step, name in types if name in known}


def _records(folder: Path) -> dict[str, Record]:
    found = (json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))
    known = set(configs.all_types("all"))
    return {record["type"]: record for record in found if record["type"] in known}


def _kept(record: Record) -> Record:
    return {k: v for k, v in record.items() if k not in ("config", "operators")}


def first_failure(record: Record) -> str:
    if record.get("reason"):
        return str(record["reason"])[:150]
    failures = record.get("failures") or []
    if not failures:
        return _refusals(record)
    first = failures[0]
    what = first.get("error") or f"{first.get('difference'):.1e}"
    return f"{len(failures)} failures: {first['subject']} {first['way']} {what}"[:190]


def _refusals(record: Record) -> str:
    refused = record.get("refused") or {}
    return "; ".join(f"{path}: {reason}" for path, reason in refused.items())[:300]


def types_page(
    examined: Mapping[str, Record], delivered: Mapping[str, Record], digests: Mapping[str, str]
) -> str:
    lines = [
        "# The zoo",
        "",
        "Written by `make zoo`; do not edit. Tiny models with weights drawn at unit gain.",
        "",
        "*Exact*: in double precision, per group, slicing equals masking (uniform, and ragged",
        "where companions allow it) and permuting units changes nothing; then all groups at once.",
        "*Reopened*: every kind of sub-layer lost units, other ones and another number of them in",
        "each layer; the module was shrunk, written, and opened in a fresh process without prunec",
        "with the same logits to the bit, cached generation equal to uncached. *Partial*: reopened",
        "so, some kind of sub-layer excepted, which was refused with the reason given.",
        "",
        *_totals(list(examined.values())),
        "",
    ]
    for step, records in (("examine", examined), ("deliver", delivered)):
        stale = {n: r for n, r in records.items() if r["sources"] != digests[step]}
        if stale:
            lines += [
                f"{len(stale)} of {len(records)} records of `{step}` are of earlier sources, "
                "marked °.",
                "",
            ]
    examined = _marked(examined, digests["examine"])
    delivered = _marked(delivered, digests["deliver"])
    for family, title in TITLES.items():
        names = [n for n in configs.all_types(family) if n in examined or n in delivered]
        lines += [f"## {title}", "", *_family(names, examined, delivered), ""]
    return "\n".join(lines).rstrip() + "\n"


def _marked(records: Mapping[str, Record], digest: str) -> dict[str, Record]:
    """Records with a mark, after the status, on those of other sources."""
    return {
        name: {**record, "mark": "" if record["sources"] == digest else "°"}
        for name, record in records.items()
    }


def _totals(records: list[Record]) -> list[str]:
    checks: Counter[str] = Counter()
    controls: Counter[str] = Counter()
    for record in records:
        checks.update({k: v for k, v in record.get("checks", {}).items() if k != "worst"})
        found = record.get("controls", {})
        controls.update({k: v for k, v in found.items() if k in ("made", "inert")})
        controls["caught"] += found.get("made", 0) - len(found.get("missed", ()))
    return [
        f"{checks['exact']} checks exact within 1e-9, {checks['kept']} of them against "
        f"kept-count statistics, {checks['vacuous']} vacuous (removing the units moves nothing). "
        f"Wrong slices on purpose: {controls['caught']} of {controls['made']} caught; "
        f"{controls['inert']} more in weights that the output does not depend on.",
    ]


def _family(
    names: list[str], examined: Mapping[str, Record], delivered: Mapping[str, Record]
) -> list[str]:
    def states(records: Mapping[str, Record]) -> str:
        found = Counter(records[name]["status"] for name in names if name in records)
        return ", ".join(f"{n} {state}" for state, n in found.most_common()) or "not run"

    return [
        f"{len(names)} types. Analysis: {states(examined)}. Delivery: {states(delivered)}.",
        "",
        "| type | analysis | groups | kinds | exact | kept-count | vacuous | wrong caught "
        "| delivery | units kept by layer | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(name, examined.get(name, {}), delivered.get(name, {})) for name in names),
    ]


def _row(name: str, record: Record, delivery: Record) -> str:
    checks, controls = record.get("checks", {}), record.get("controls", {})
    kinds = ", ".join(f"{n} {kind}" for kind, n in record.get("kinds", {}).items())
    notes = [first_failure(record)]
    if record.get("missing"):
        notes.append("no rule: " + ", ".join(record["missing"]))
    if delivery.get("status") != record.get("status"):
        notes.append(first_failure(delivery))
    caught = f"{controls.get('caught', 0)}/{controls.get('made', 0)}" if controls else ""
    cells = [
        name.rpartition("/")[-1],
        record.get("status", "") + record.get("mark", ""),
        record.get("groups", ""),
        kinds,
        checks.get("exact", ""),
        checks.get("kept", ""),
        checks.get("vacuous", ""),
        caught,
        delivery.get("status", "") + delivery.get("mark", ""),
        _taken(delivery),
        "; ".join(note for note in notes if note).replace("|", "/"),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _taken(delivery: Record) -> str:
    parts = []
    for kinds in delivery.get("taken", {}).values():
        parts += [f"{kind} {kept}" for kind, kept in kinds.items()]
    return ", ".join(parts)


def operators_table(records: list[Record]) -> str:
    calls: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for record in records:
        calls.update(record.get("operators", {}))
        types.update(record.get("operators", {}).keys())
    lines = [
        "# Operators",
        "",
        f"Written by `make zoo` from the graphs of {len(records)} types; do not edit. An operator",
        "without a rule is never guessed: every axis that it reads or writes is pinned.",
        "",
        "| operator | calls | types | rule |",
        "|---|---|---|---|",
    ]
    for operator, count in sorted(calls.items(), key=lambda item: (-item[1], item[0])):
        state = "yes" if "getitem" in operator or has_rule(operator) else "**none: pinned**"
        lines.append(f"| `{operator}` | {count} | {types[operator]} | {state} |")
    return "\n".join(lines) + "\n"
