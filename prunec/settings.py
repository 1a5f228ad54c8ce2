"""Settings as text: YAML, in which 1e-3 is a number as in Python."""

from __future__ import annotations

import re
from typing import Any

import yaml

from prunec.errors import PlanError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes a number with an exponent but without a point and a sign for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


def read_settings(text: str, what: str, *, where: str | None = None) -> Any:
    """The plain data of a YAML text.

    >>> read_settings("{damping: 1e-3}", "the recipe")
    {'damping': 0.001}

    Args:
        what: that is read, for the message.

    Raises:
        PlanError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanError(f"{what} is not YAML: {error}", where=where) from error
