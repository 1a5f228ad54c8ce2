"""Targets are hit in their own unit, and constraints hold in what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from prunec.errors import PlanError
from prunec.graph.cost import flops, parameter_count
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.importance.magnitude import Magnitude
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.prune import Pruned, prune_sites
from prunec.passes.recipe import Recipe, load_recipe
from prunec.passes.setup import Setup
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights, slice_program
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.constraints import Constraints, hardware
from prunec.passes.targets.costs import Flops, KvCache, Memory, Parameters
from prunec.passes.targets.goal import Goal, amount, block_parameters
from prunec.passes.targets.latency import LatencyMeasure, paired_ratio
from prunec.passes.targets.question import block_budget
from prunec.passes.targets.target import Target, chosen_target


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 16), generator=generator)} for _ in range(3)
    ]


@cache
def coupled(attention: str = "sdpa") -> CouplingGraph:
    """Three blocks of 8 heads in 4 KV groups and 96 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return couple(trace(model, batches()[0]))


def run(
    target: str | float, *, limits: Constraints | None = None, **settings: Any
) -> tuple[Pruned, Budget]:
    coupling = coupled()
    recipe: Recipe = load_recipe("magnitude").override(settings)
    aim = Target.parse(target) if isinstance(target, str) else target
    goal = Goal.on(coupling, aim)
    limits = limits or Constraints()
    sites = limits.free(goal.concerned(find_sites(coupling, recipe.units)[0]))
    criterion = recipe.importance.build("importance")
    mend = recipe.compensation.build("compensation")
    setup = Setup(coupling, sites, criterion, mend, batches(), Weights(coupling))
    budget = block_budget(
        coupling,
        sites,
        recipe.allocation.build("allocation"),
        goal,
        survey=DenseSurvey(setup),
        constraints=limits,
    )
    return prune_sites(setup, budget), budget


def counts(pruned: Pruned) -> Mapping[str, int]:
    """Units kept by group name, whole groups included."""
    kept = pruned.selection.counts
    return {group.name: kept.get(group.dim, group.size) for group in coupled().groups}


def of_kind(pruned: Pruned, kind: str) -> list[int]:
    return [counts(pruned)[group.name] for group in coupled().groups if group.kind == kind]


@pytest.mark.parametrize("text", ["params=30000", "params=30k", "params=80%"])
def test_parameters_left(text: str) -> None:
    pruned, _ = run(text)
    left = parameter_count(coupled(), pruned.selection.counts)
    wanted = 0.8 * parameter_count(coupled()) if "%" in text else 30_000
    assert left == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("allocation", ["uniform", "log-increase", "similarity-softmax", "global"])
@pytest.mark.parametrize("part", [0.6, 0.85])
def test_flops_left_by_every_allocation(part: float, allocation: str) -> None:
    pruned, _ = run(f"flops={100 * part}%", allocation=allocation)
    assert flops(coupled(), pruned.selection.counts) == pytest.approx(
        part * flops(coupled()), rel=0.005
    )


@dataclass(frozen=True)
class _FirstOfAll:
    """Asks the first site for nearly all."""

    needs_data = False

    def shares(self, context: Context) -> Mapping[str, float]:
        first, *others = context.rooms
        return {first.site: 1.0, **{room.site: 1e-3 for room in others}}


def test_what_nobody_could_give_back_is_not_removed() -> None:
    """1.6 KV groups are asked of the first site: the nearest, two, would go beyond the target."""
    coupling = coupled()
    goal = Goal.on(coupling, Target.parse(f"params={parameter_count(coupling) - 1229}"))
    sites, _ = find_sites(coupling, ["kv_group", "ffn_channel"])
    setup = Setup(coupling, sites, Magnitude(), NoCompensation(), batches(), Weights(coupling))
    budget = block_budget(coupling, sites, _FirstOfAll(), goal)
    pruned = prune_sites(setup, budget)
    left = parameter_count(coupling, pruned.selection.counts)
    assert of_kind(pruned, "kv_group")[0] == 3
    assert left == pytest.approx(parameter_count(coupling) - 1229, rel=0.005)


def test_memory_left_is_the_bytes_of_the_parameters() -> None:
    pruned, _ = run("memory=0.12MB")
    left = sum(pruned.weights[name].nbytes for name in coupled().program.parameters)
    assert left == pytest.approx(120_000, rel=0.005)


@pytest.mark.parametrize("allocation", ["uniform", "log-increase", "similarity-softmax", "global"])
def test_a_kv_cache_target_prunes_kv_groups_alone(allocation: str) -> None:
    pruned, _ = run("kv-cache=50%", allocation=allocation)
    assert sum(of_kind(pruned, "kv_group")) == 6
    assert of_kind(pruned, "query_head") == [2, 2, 2]
    assert of_kind(pruned, "ffn_channel") == [96, 96, 96]
    # Bytes a token: keys and values of 6 of 12 KV groups of 4 features in fp32.
    assert KvCache(coupled()).whole() == 2 * 12 * 4 * 4


def test_a_cache_is_found_where_attention_is_written_out() -> None:
    """As products around a softmax: with a batch axis, and (Bloom) batches and heads in one."""
    fused, written = KvCache(coupled()), KvCache(coupled("eager"))
    assert written.whole() == fused.whole()
    for site in find_sites(coupled("eager"), ("kv_group",))[0]:
        (group,) = site.groups
        assert written.at(site, {group.name: 1}) == written.at(site, {}) / 4
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=6)
    bloom = BloomForCausalLM(config).eval().requires_grad_(False)
    assert KvCache(couple(trace(bloom, batches()[0]))).whole() == 2 * 2 * 24 * 4


def test_a_target_between_two_whole_units_says_what_is_reachable() -> None:
    with pytest.raises(PlanError) as raised:
        run("kv-cache=54%")
    reachable = float(str(raised.value.so).rpartition("(")[2].rstrip("%)"))
    pruned, _ = run(f"kv-cache={reachable:.1f}%")
    assert sum(of_kind(pruned, "kv_group")) == round(12 * reachable / 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=10", "cannot be removed"),
        ("params=1G", "which is no more"),
        ("flops=1%", "cannot be removed"),
        ("flops=120%", "nothing between"),
        ("flop=70%", "not a target"),
        ("params=10MB", "not a target"),
        ("params", "not a target"),
        ("latency=3", "not a target"),
        ("ratio=1.2", "not possible"),
    ],
)
def test_targets_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run(text)


@pytest.mark.parametrize(
    "text", ["params=1e+08", "flops=70%", "kv-cache=1024", "latency=0.012s", "ratio=0.2"]
)
def test_a_target_reads_back(text: str) -> None:
    target = Target.parse(text)
    assert Target.parse(str(target)) == target


def test_a_ratio_and_a_target_exclude_each_other() -> None:
    assert chosen_target(None, None) == Target.of_ratio(0.2)
    with pytest.raises(PlanError, match="both given"):
        chosen_target(0.2, "flops=70%")


def test_the_costs_of_the_sites_add_up_to_the_change_of_the_whole() -> None:
    pruned, budget = run(0.4)
    coupling, kept = coupled(), pruned.selection.counts
    sites = find_sites(coupling, ("ffn_channel", "kv_group", "query_head"))[0]
    for measure, after in (
        (Parameters(coupling), parameter_count(coupling, kept)),
        (Flops(coupling), flops(coupling, kept)),
        (Memory(coupling), 4 * parameter_count(coupling, kept)),
    ):
        change = sum(measure.at(s, {}) - measure.at(s, counts(pruned)) for s in sites)
        assert measure.whole() - change == pytest.approx(after, rel=1e-12)
    assert budget.removed == pytest.approx(
        Parameters(coupling).whole() - parameter_count(coupling, kept)
    )


def test_latency_is_measured_and_a_smaller_site_is_no_dearer() -> None:
    measure = LatencyMeasure(coupled())
    sites, _ = find_sites(coupled(), ("ffn_channel",))
    (site, *_), name = sites, sites[0].groups[0].name
    assert sum(measure.at(site, {}) for site in sites) < measure.whole()
    assert 0 < measure.at(site, {name: 8}) < 2 * measure.at(site, {name: 96})
    assert measure.at(site, {name: 50}) == measure.at(site, {name: 50})
    pruned, _ = run(0.5)
    small = slice_program(coupled(), pruned.selection, pruned.weights)
    factor, spread = paired_ratio(coupled().program, small, pairs=3)
    assert 0.1 < factor < 3
    assert spread >= 0


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_multiples_hold_and_the_total_is_met(ratio: float) -> None:
    pruned, budget = run(ratio, limits=Constraints({"ffn_channel": 8}))
    assert all(width % 8 == 0 for width in of_kind(pruned, "ffn_channel"))
    total = sum(block_parameters(coupled()).values())
    assert abs(budget.removed - ratio * total) <= max(96, 0.005 * ratio * total)
    assert budget.rounding == pytest.approx(budget.removed - ratio * total, abs=1)


@pytest.mark.parametrize(
    ("multiple", "ratio", "units"),
    [
        (32, 0.2, "ffn_channel"),
        (48, 0.33, "ffn_channel"),
        (24, 0.41, "ffn_channel"),
        (32, 0.2, "ffn_channel,kv_group"),
        (24, 0.41, "ffn_channel,kv_group"),
    ],
)
def test_what_multiples_are_said_to_reach_is_reached(
    multiple: int, ratio: float, units: str
) -> None:
    limits = Constraints({"ffn_channel": multiple, "kv_group": 2})
    with pytest.raises(PlanError, match="whole units come to") as raised:
        run(ratio, limits=limits, units=units)
    reached = float(str(raised.value.so).rpartition(" ")[2])
    assert reached != pytest.approx(ratio, rel=0.005)
    _, budget = run(reached, limits=limits, units=units)
    total = sum(block_parameters(coupled()).values())
    assert budget.removed / total == pytest.approx(reached, rel=0.005)


def test_wide_groups_are_aligned() -> None:
    """96 channels are 32 steps of 3; of 4 they are too few."""
    plain, aligned, narrow = (run("params=30k", limits=Constraints(align=n))[0] for n in (1, 3, 4))
    widths = [of_kind(pruned, "ffn_channel") for pruned in (plain, aligned, narrow)]
    assert any(width % 3 for width in widths[0])
    assert [width % 3 for width in widths[1]] == [0, 0, 0]
    assert widths[2] == widths[0]
    left = parameter_count(coupled(), aligned.selection.counts)
    assert left == pytest.approx(30_000, rel=0.005)


def test_alignment_yields_to_the_target_and_to_multiples() -> None:
    """A third of a step is 96 parameters, and 0.5 % of what is to go are 19."""
    pruned, budget = run(0.1, limits=Constraints(align=3))
    assert any(width % 3 for width in of_kind(pruned, "ffn_channel"))
    assert abs(budget.rounding) <= 96
    pruned, _ = run("params=30k", limits=Constraints({"ffn_channel": 2}, align=3))
    assert any(width % 3 for width in of_kind(pruned, "ffn_channel"))
    assert [width % 2 for width in of_kind(pruned, "ffn_channel")] == [0, 0, 0]


def test_a_group_smaller_than_the_multiple_stays_whole() -> None:
    limits = Constraints({"ffn_channel": 128})
    pruned, _ = run("kv-cache=50%", limits=limits)
    assert of_kind(pruned, "ffn_channel") == [96, 96, 96]
    with pytest.raises(PlanError, match="cannot be removed"):
        run(0.6, limits=limits, units="ffn_channel")


def test_what_tensor_parallelism_keeps_whole_is_not_ranked() -> None:
    """Of 4 KV groups on 4 devices none can go; query heads of each still can."""
    limits = hardware("tp=4")
    sites = limits.free(find_sites(coupled(), ("kv_group", "query_head", "ffn_channel"))[0])
    assert [group.kind for site in sites for group in site.groups] == [
        "query_head",
        "ffn_channel",
    ] * 3
    pruned, budget = run(0.3, limits=limits, units="kv_group,query_head,ffn_channel")
    assert of_kind(pruned, "kv_group") == [4, 4, 4]
    assert sum(of_kind(pruned, "query_head")) < 6
    assert abs(budget.rounding) <= 0.05 * budget.goal.remove


def test_tensor_parallel_divides_heads_groups_and_widths() -> None:
    pruned, _ = run(0.45, limits=hardware("tp=2"))
    assert {n % 2 for n in of_kind(pruned, "kv_group") + of_kind(pruned, "ffn_channel")} == {0}
    with pytest.raises(PlanError, match="too few for tensor parallelism"):
        run(0.45, limits=hardware("tp=8"))
    with pytest.raises(PlanError, match="constraints remove"):
        run(0.02, limits=hardware("tp=3"))


def test_bounds_hold_at_every_layer() -> None:
    pruned, _ = run(0.3, limits=Constraints(minimum=0.25, maximum=0.4), allocation="log-increase")
    for report in pruned.sites:
        assert 0.25 <= report.removed / report.parameters <= 0.4


def test_bounds_with_no_whole_units_between_them_say_what_there_is() -> None:
    for bounds, said in (((0.05, 0.1), "0.0% or 25.0%"), ((0.8, 1.0), "75.0%")):
        with pytest.raises(PlanError, match="no whole units are between") as raised:
            run(0.1, limits=Constraints(minimum=bounds[0], maximum=bounds[1]), units=["kv_group"])
        assert raised.value.so == f"it can give {said}"


def test_what_bounds_are_said_to_reach_is_reached() -> None:
    """A quarter of the KV groups, though the bound is beyond that, in another measure too."""
    limits = Constraints(maximum=0.4)
    with pytest.raises(PlanError, match=r"at least 288 bytes a token \(75.00%\) are left"):
        run("kv-cache=70%", limits=limits)
    pruned, _ = run("kv-cache=288", limits=limits)
    assert of_kind(pruned, "kv_group") == [3, 3, 3]


@pytest.mark.parametrize(
    ("protect", "whole"),
    [
        ("0", ["model.layers.0."]),
        ("-1", ["model.layers.2."]),
        ("model.layers.1.mlp", ["model.layers.1.mlp"]),
    ],
)
def test_protected_layers_stay_whole(protect: str, whole: list[str]) -> None:
    pruned, _ = run(0.4, limits=Constraints(protect=(protect,)))
    inside = [r for r in pruned.sites if any(r.site.startswith(w) for w in whole)]
    assert inside
    assert all(report.removed == 0 for report in inside)
    others = [r for r in pruned.sites if r not in inside]
    assert all(report.removed > 0 for report in others)


def test_a_tied_name_protects_its_weight() -> None:
    names = {"embed.weight": "embed.weight", "head.weight": "embed.weight"}
    assert Constraints(protect=("head",)).protected([], names) == {"embed.weight"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hardware("tpu"), "no hardware preset"),
        (lambda: hardware("tp=0"), "no hardware preset"),
        (lambda: Constraints(minimum=0.5, maximum=0.2), "not possible"),
        (lambda: Constraints({"ffn_channel": 0}), "not possible"),
        (lambda: Constraints(align=0), "align=0 is not possible"),
        (lambda: Constraints({"ffn_chanel": 8}), "no kind of unit"),
        (lambda: Constraints.from_dict({"minimum": "some"}), "minimum='some' is not possible"),
        (lambda: Constraints.from_dict({"protect": 0.5}), "protect=0.5 is not possible"),
        (lambda: Constraints.from_dict({"protect": ["0", None]}), "is not possible"),
        (lambda: Constraints.from_dict({"multiples": 3}), "did you mean 'multiple_of'"),
        (lambda: Constraints.from_dict([8]), "mapping of settings"),
        (lambda: run(0.3, limits=Constraints(protect=("7",))), "cannot protect block 7"),
        (lambda: run(0.3, limits=Constraints(protect=("model.layers.1.ml",))), "no parameter of"),
    ],
)
def test_constraints_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_constraints_of_a_recipe_read_back() -> None:
    recipe = load_recipe("slimgpt").override(
        {"constraints.multiple_of": 64, "constraints.protect": "0,-1", "constraints.maximum": 0.7}
    )
    assert recipe.constraints == Constraints({"ffn_channel": 64}, 0.0, 0.7, 1, ("0", "-1"), 8)
    assert Recipe.from_dict(recipe.to_dict(), where="here") == recipe


def test_presets_combine() -> None:
    both = hardware("gpu,vllm,tp=2").combined(hardware("gguf-k"))
    assert both == Constraints({"ffn_channel": 256}, tensor_parallel=2)
    assert amount("kv-cache", 10) == "10 bytes a token"
