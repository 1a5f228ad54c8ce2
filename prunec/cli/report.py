"""A pruning report as tables: what it cost, and what each site gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunec.api import Outline, Report
    from prunec.cli.console import Screen
    from prunec.passes.prune import SiteReport
    from prunec.passes.sites import Skipped


def show_report(screen: Screen, report: Report) -> None:
    """Totals, the ratio wanted and realised at every site, what was skipped, what was checked."""
    show_totals(screen, report)
    if report.sites:
        columns = ["site", "parameters", "wanted", "realised", "kept", "error"]
        screen.table("Sites", columns, [_site(site) for site in report.sites], words=(0, 4))
    if lacking := [site.site for site in report.sites if site.bias is False]:
        screen.say(f"No bias was fitted where the model has no place for one: {', '.join(lacking)}")
    _show_skipped(screen, report.skipped)
    _show_aim(screen, report)
    screen.say(f"Comparisons with a reference that passed: {len(report.checks)}")


def show_totals(screen: Screen, report: Report) -> None:
    """What the whole model lost."""
    screen.table(
        "Result", ["", "before", "after", "removed"], [_change(*row) for row in _totals(report)]
    )


def show_outline(screen: Screen, outline: Outline) -> None:
    """What a run would ask of every site, before any unit is ranked."""
    from prunec.passes.targets.goal import amount

    rows = [
        [site, f"{held:,}", f"{wanted:,}", f"{wanted / held:.1%}"]
        for site, (held, wanted) in outline.wanted.items()
    ]
    screen.table("Sites", ["site", "parameters", "wanted", "ratio"], rows)
    _show_skipped(screen, outline.skipped)
    kind = outline.goal.partition("=")[0]
    target = amount(kind, outline.target)
    screen.say(
        f"{target} would go; the blocks hold {outline.block_parameters:,} parameters."
        if outline.wanted
        else f"{target} would go; what gives them is decided in the run."
    )


def _show_aim(screen: Screen, report: Report) -> None:
    """What was asked for and reached, and what whole units and multiples took beyond it."""
    if not report.aim:
        return
    from prunec.passes.targets.goal import amount

    kind = str(report.aim["target"]).partition("=")[0]
    reached, rounding = report.aim["reached"], report.aim["rounding"]
    screen.say(
        f"Target {report.aim['target']}: {amount(kind, reached)} left of"
        f" {amount(kind, report.aim['before'])}; rounding to whole units and multiples took"
        f" {amount(kind, abs(rounding))} {'more' if rounding >= 0 else 'less'}."
    )
    if "measured_factor" in report.aim:
        screen.say(
            f"Measured: {report.aim['measured_factor']:.3f} x the dense model's latency,"
            f" within {report.aim['measured_spread']:.1%} on this machine."
        )


def _show_skipped(screen: Screen, skipped: Sequence[Skipped]) -> None:
    if skipped:
        screen.facts("Left whole", [[item.group, item.reason] for item in skipped])


def _totals(report: Report) -> list[tuple[str, int, int]]:
    return [
        ("block parameters", *report.block_parameters),
        ("all parameters", *report.parameters),
        ("FLOPs of a pass", *report.flops),
    ]


def _change(name: str, before: int, after: int) -> list[str]:
    removed = 1 - after / before if before else 0.0
    return [name, f"{before:,}", f"{after:,}", f"{removed:.2%}"]


def _site(site: SiteReport) -> list[str]:
    """Ratios are of the parameters that the site's groups hold."""
    return [
        site.site,
        f"{site.parameters:,}",
        f"{site.wanted / site.parameters:.1%}",
        f"{site.removed / site.parameters:.1%}",
        _kept(site.kept),
        "" if site.error is None else f"{site.error:.4f}",
    ]


def _kept(kept: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.rpartition('/')[2]}" for name, count in kept.items())
