"""Dim rules: how each operator ties axes. One file a family; see `registry` for what a rule is."""

from functools import cache

from prunec.errors import PluginError
from prunec.graph.rules import (
    contract,
    create,
    cut,
    index,
    layout,
    norm,
    pointwise,
    recurrent,
    spatial,
)
from prunec.graph.rules.registry import RULES, Call, Domain, Resized, Rule, Rules, Value
from prunec.registry import names, plugin

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
    "cut",
    "index",
    "installed_rules",
    "layout",
    "norm",
    "pointwise",
    "recurrent",
    "spatial",
]


@cache
def installed_rules() -> Rules:
    """The rules of prunec and of the installed plug-ins.

    An entry point in the group ``prunec.op_rules`` is a function that is given the table and adds
    to it.
    """
    for name in names("op_rules"):
        register = plugin("op_rules", name)
        try:
            register(RULES)
        except Exception as error:
            raise PluginError(
                f"the op_rules plug-in {name!r} fails: {error!r}",
                fix="repair or uninstall that package",
            ) from error
    return RULES
