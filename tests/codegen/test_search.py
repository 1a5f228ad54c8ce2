"""The search over readings: likelier first, bounded, and honest about what it cannot tell."""

from __future__ import annotations

import pytest

from prunec.codegen.attributes import Candidate
from prunec.codegen.search import Choice, search
from prunec.errors import ExportError


def candidate(name: str, *options: int, old: int = 9) -> Candidate:
    values = (*((value,) for value in options), (old,))
    return Candidate("role", name, ("m",), (old,), values, (frozenset[str](),) * len(values), None)


def picked(choice: Choice) -> dict[str, object]:
    return {field.name: values[0] for field, values in choice.items()}


def test_tries_the_fewest_steps_from_the_likeliest_first() -> None:
    tried: list[dict[str, object]] = []

    def judge(choice: Choice) -> str | None:
        tried.append(picked(choice))
        return None if picked(choice) == {"a": 9, "b": 2} else "no"

    accepted = search([candidate("a", 1), candidate("b", 2)], judge)
    assert tried[:3] == [{"a": 1, "b": 2}, {"a": 1, "b": 9}, {"a": 9, "b": 2}]
    assert accepted.trials == len(tried) == 5
    assert set(accepted.equivalents.values()) == {()}


def test_reports_what_else_passes() -> None:
    a, b = candidate("a", 1, 2), candidate("b", 3)
    accepted = search([a, b], lambda choice: None if choice[b] == (3,) else "no")
    assert accepted.equivalents == {a: ((2,), (9,)), b: ()}


def test_none_accepted_names_candidates_and_the_first_failure() -> None:
    with pytest.raises(ExportError) as caught:
        search([candidate("num_heads", 4)], lambda _: "2 x 7: off by 0.3")
    assert str(caught.value) == (
        "no setting of the module's numbers makes it equal to the masked model (2 tried)\n"
        "  at   role.num_heads: 9 -> 4\n"
        "  so   the likeliest setting fails: 2 x 7: off by 0.3\n"
        "  fix  leave these groups unpruned: `--set units=ffn_channel` leaves all heads whole"
    )


def test_trials_are_bounded() -> None:
    calls = 0

    def judge(_: Choice) -> str:
        nonlocal calls
        calls += 1
        return "no"

    with pytest.raises(ExportError, match="20 tried"):
        search([candidate(str(i), 1, 2, 3) for i in range(12)], judge, limit=20)
    assert calls == 20


def test_nothing_to_set_is_one_trial() -> None:
    assert search([], lambda _: None).trials == 1
