"""Dim rules: how each operator ties axes. One file a family; see `registry` for what a rule is."""

from prunec.graph.rules import contract, create, index, layout, norm, pointwise, spatial
from prunec.graph.rules.registry import RULES, Call, Domain, Resized, Rule, Rules, Value

__all__ = [
    "RULES",
    "Call",
    "Domain",
    "Resized",
    "Rule",
    "Rules",
    "Value",
    "contract",
    "create",
    "index",
    "layout",
    "norm",
    "pointwise",
    "spatial",
]
