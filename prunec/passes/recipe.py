"""Recipes: small YAML files that name a method's parts and their options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from prunec import registry
from prunec.contract import Contract
from prunec.errors import PlanError, PluginError
from prunec.graph.kinds import KINDS
from prunec.importance.curves import Criterion, RemovalCurve
from prunec.importance.influence import DepthCriterion
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.compensation.closed_form import Compensation, Mended
from prunec.passes.decision import Pass
from prunec.passes.plan import Plan
from prunec.passes.shallow import DEPTH_KINDS
from prunec.passes.targets.constraints import Constraints
from prunec.registry import nearest
from prunec.settings import read_settings

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Part:
    """One part of a recipe, a plug-in's name and its options: ``obs{score=exact}``."""

    name: str
    options: Mapping[str, Scalar]

    def __str__(self) -> str:
        inner = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}{{{inner}}}" if inner else self.name

    def build(self, group: str, contract: Contract | None = None) -> Any:
        """The plug-in with these options.

        Args:
            contract: what it has to be, of a group that none of a recipe's parts is of.

        Raises:
            PluginError: no plug-in of that name, one that is no dataclass, or one that lacks what
                the group needs.
            PlanError: an option it does not have (the nearest is named) or does not accept.
        """
        made = registry.plugin(group, self.name)
        if not (isinstance(made, type) and is_dataclass(made)):
            raise PluginError(
                f"the {group} plug-in {self.name!r} is no dataclass",
                fix="name a class with @dataclass(frozen=True), whose fields are its options",
            )
        known = [f.name for f in fields(made)]
        for key in self.options:
            if key not in known:
                raise PlanError(
                    f"{group} {self.name} has no option {key!r}",
                    fix=nearest(key, known) if known else f"{self.name} has no options",
                )
        hints = _hints(made)
        for key, value in self.options.items():
            if (wanted := _refused(value, hints.get(key))) is not None:
                raise PlanError(f"{group} {self.name}: {key}={value!r} is not possible", fix=wanted)
        if made.__module__.partition(".")[0] != "prunec":
            called = f"the {group} plug-in {self.name!r}"
            made = (contract or _contract(group, made)).hold(made, called)
        try:
            return made(**self.options)
        except TypeError as error:
            raise PlanError(f"{group} {self}: {error}") from error


@dataclass(frozen=True)
class Recipe:
    """A method: what is pruned, how units are ranked, how much each block gives, what mends it.

    ``modes`` are named settings that ``mode=NAME`` applies; without it the recipe is as it says.
    ``decision`` is a plug-in's pass (`prunec.passes.decision.Pass`), which says all by itself: the
    recipe then has a name, what describes it, and ``pass``.
    """

    name: str
    summary: str
    paper: str
    deviations: tuple[str, ...]
    units: tuple[str, ...]
    importance: Part
    allocation: Part
    compensation: Part
    constraints: Constraints = field(default_factory=Constraints)
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    decision: Part | None = None

    @property
    def needs_data(self) -> bool:
        """Whether calibration data decides anything; some criteria look at the weights alone."""
        if self.decision is not None:
            return bool(self.decision.build("passes").needs_data)
        criterion, allocation, compensation = (getattr(self, part).build(part) for part in PARTS)
        statistics = getattr(criterion, "statistics", None)  # of whole branches it has none
        reads = statistics is None or bool(statistics | compensation.statistics)
        return reads or bool(allocation.needs_data)

    def override(self, settings: Mapping[str, Scalar | Sequence[str]]) -> Recipe:
        """This recipe with other settings: ``{"importance": "wanda", "allocation.first": 0.1}``.

        A part's name replaces the part and drops its options.

        Raises:
            PlanError: for a key that a recipe does not have, naming the nearest.
        """
        recipe = self
        for key, value in settings.items():
            recipe = recipe._set(key, value)
        return recipe

    def _set(self, key: str, value: Any) -> Recipe:
        head, _, option = key.partition(".")
        if self.decision is not None:
            if head != "pass":
                raise PlanError(f"{self.name} has no setting {key!r}", fix=_OF_A_PASS)
            return replace(self, decision=_changed(self.decision, option, value))
        if key == "mode" and self.modes:
            if value not in self.modes:
                raise PlanError(
                    f"{self.name} has no mode {value!r}", fix=nearest(str(value), [*self.modes])
                )
            return replace(self, modes={}).override(self.modes[value])
        if head == "units" and not option:
            return replace(self, units=_units(value))
        if head == "constraints":
            given = self.constraints.to_dict() | {option: value} if option else value
            return replace(self, constraints=Constraints.from_dict(given))
        if head not in PARTS:
            raise PlanError(
                f"a recipe has no setting {key!r}",
                fix=nearest(head, [*PARTS, "units", "constraints", *["mode"][: len(self.modes)]]),
            )
        changed: dict[str, Any] = {head: _changed(getattr(self, head), option, value)}
        return replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """As in the YAML file."""
        about = {
            "name": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "deviations": list(self.deviations),
        }
        if self.decision is not None:
            return {**about, "pass": {"name": self.decision.name, **self.decision.options}}
        parts = {
            head: {"name": part.name, **part.options}
            for head in PARTS
            for part in [getattr(self, head)]
        }
        return {
            **about,
            "units": list(self.units),
            **parts,
            **({"constraints": limits} if (limits := self.constraints.to_dict()) else {}),
            **({"modes": {k: dict(v) for k, v in self.modes.items()}} if self.modes else {}),
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_dict(cls, data: Any, *, where: str) -> Recipe:
        """Raises PlanError for anything but the keys of a recipe."""
        if not isinstance(data, dict):
            raise PlanError("a recipe is a mapping of settings", where=where)
        known = [f.name for f in fields(cls) if f.name != "decision"]
        for key in data:
            if key not in (*known, "pass"):
                raise PlanError(
                    f"a recipe has no setting {key!r}",
                    where=where,
                    fix=nearest(str(key), [*known, "pass"]),
                )
        decision = _part(data["pass"], where=f"{where}: pass") if "pass" in data else None
        if decision is not None:
            if idle := [key for key in data if key not in (*_ABOUT, "pass")]:
                raise PlanError(
                    f"a recipe with a pass has no {', '.join(idle)}", where=where, fix=_OF_A_PASS
                )
            # Stand-ins, which nothing reads: the other parts are of recipes without a pass.
            data = {"units": ["block"], "importance": "last-first", **data}
        missing = [key for key in ("name", "units", "importance") if key not in data]
        if missing:
            raise PlanError(f"the recipe lacks {', '.join(missing)}", where=where)
        plain = {"allocation": "uniform", "compensation": "none"}
        parts = {h: _part({**plain, **data}[h], where=f"{where}: {h}") for h in PARTS}
        return cls(
            name=str(data["name"]),
            summary=str(data.get("summary", "")),
            paper=str(data.get("paper", "")),
            deviations=tuple(map(str, data.get("deviations", ()))),
            units=_units(data["units"], where=where),
            **parts,
            constraints=Constraints.from_dict(
                data.get("constraints", {}), where=f"{where}: constraints"
            ),
            modes=_modes(data.get("modes", {}), where=f"{where}: modes"),
            decision=decision,
        )

    def build(self) -> None:
        """Build every part once.

        Raises:
            PluginError, PlanError: one that does not exist, or an option that it does not take.
        """
        for head in PARTS:
            getattr(self, head).build(head)
        if self.decision is not None:
            self.decision.build("passes")


PARTS = ("importance", "allocation", "compensation")


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    folder = files("prunec.passes") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a YAML file by path.

    Raises:
        PlanError: neither exists (the nearest name is given), or the file is no recipe.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise PlanError(f"no such recipe file: {name}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the recipe cannot be read: {error}", where=name) from error
        return Recipe.from_dict(read_settings(text, "the recipe", where=name), where=name)
    if name not in recipe_names():
        raise PlanError(f"no recipe named {name!r}", fix=nearest(name, recipe_names()))
    text = (files("prunec.passes") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_dict(read_settings(text, "the recipe", where=name), where=name)


_ABOUT = ("name", "summary", "paper", "deviations")
_OF_A_PASS = "a pass decides by itself what goes; its options are pass.OPTION=VALUE"


def _changed(part: Part, option: str, value: Any) -> Part:
    """The part with one option changed; without an option named, the part of that name."""
    if option:
        return Part(part.name, {**part.options, option: value})
    return part if value == part.name else Part(str(value), {})


def _contract(group: str, made: type) -> Contract:
    """What a plug-in of a group has to be."""
    if group == "importance" and hasattr(made, "removals"):
        return Contract(DepthCriterion)
    return {
        "importance": Contract(Criterion, {"rank": RemovalCurve}),
        "allocation": Contract(Allocation, {"shares": Mapping}),
        "compensation": Contract(Compensation, {"compensate": Mended}),
        "passes": Contract(Pass, {"plan": Plan}),
    }[group]


def _hints(made: Any) -> dict[str, Any]:
    """The declared types of a plug-in's options; none where it names types it does not import."""
    try:
        return get_type_hints(made)
    except NameError:
        return {}


def _refused(value: Scalar, hint: Any) -> str | None:
    """None if an option's value is of its declared type, else what would be."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    plain = {kind: _PLAIN[kind] for kind in kinds if kind in _PLAIN}
    if len(words) + len(plain) == 0 or value in words:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "use a finite number"
    if any(type(value) in accepted for accepted, _ in plain.values()):
        return None
    if words:
        return nearest(str(value), list(map(str, words)))
    return f"use {' or '.join(said for _, said in plain.values())}"


_PLAIN: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
    NoneType: ((NoneType,), "null"),
}


def _units(value: Any, *, where: str | None = None) -> tuple[str, ...]:
    """Kinds of units: a list of them, or one text with commas."""
    kinds = value.split(",") if isinstance(value, str) else value
    if not (isinstance(kinds, list | tuple) and kinds):
        raise PlanError(f"units={value!r} is not possible", where=where, fix="units=KIND,KIND,...")
    known = [*KINDS, *sorted(DEPTH_KINDS)]
    for kind in kinds:
        if kind not in known:
            raise PlanError(
                f"no kind of unit is named {kind!r}", where=where, fix=nearest(str(kind), known)
            )
    return tuple(kinds)


def _modes(data: Any, *, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(data, dict) or not all(isinstance(mode, dict) for mode in data.values()):
        raise PlanError("modes are a mapping of names to settings", where=where)
    return {str(name): dict(mode) for name, mode in data.items()}


def _part(data: Any, *, where: str) -> Part:
    if isinstance(data, str):
        return Part(data, {})
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        return Part(data["name"], {str(k): v for k, v in data.items() if k != "name"})
    raise PlanError("a part of a recipe is a name, or a mapping with a name", where=where)
