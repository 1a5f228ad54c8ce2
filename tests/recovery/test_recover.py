"""Recovery on a tiny model: what trains, what is kept, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXT, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from prunec.calibration.rows import Sample
from prunec.errors import CheckpointError, PlanError
from prunec.recovery.adapters import attach, find_targets, merge, norms
from prunec.recovery.packing import collate, single
from prunec.recovery.recover import Recovered, recover
from prunec.recovery.settings import load_recovery, recovery_names
from prunec.recovery.teacher import Teacher, distillation_loss, learnt_positions, soft_targets
from prunec.recovery.training import Training, planned_steps

pytestmark = [pytest.mark.engine("peft"), pytest.mark.filterwarnings("ignore")]
TINY = {"steps": 8, "seq_len": 32, "batch_size": 4, "rank": 4, "evaluate_every": 2}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text(TEXT * 40)
    return str(tmp_path / "t.txt")


def run(text: str, name: str, model: Any = None, **options: Any) -> Recovered:
    settings = load_recovery(name).override({**TINY, **options.pop("settings", {})})
    options.setdefault("work", Path(text).parent / "work")
    model = tiny_llama() if model is None else model
    return recover(model, tiny_tokenizer(), text, settings, **options)


def test_targets_are_found_by_structure() -> None:
    model = tiny_llama()
    found = find_targets(model, {"input_ids": torch.arange(22).reshape(2, 11)})
    assert found.stacks == ()
    assert len(found.layers) == 2 * 7
    assert "lm_head" not in found.layers
    assert "model.layers.1.mlp.down_proj" in found.layers
    assert set(norms(model)) == {
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    }


def test_lora_lowers_the_loss_and_merges_to_what_its_adapter_computes(text: str) -> None:
    from peft import PeftModel

    found = run(text, "lora", base="dense")
    report = found.report
    assert report.improved
    assert report.after < report.before - 0.05
    assert report.after == pytest.approx(min(p.loss for p in report.held_out_losses))
    assert report.steps == 8
    assert not any("lora" in name for name, _ in found.model.named_parameters())
    assert found.adapter is not None
    adapted = PeftModel.from_pretrained(tiny_llama(), found.adapter).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        a, b = adapted(input_ids=ids).logits, found.model(input_ids=ids).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    config = json.loads((found.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "dense"


@pytest.mark.parametrize("name", ["lora", "full"])
def test_after_training_in_bf16_the_model_computes_in_its_own_precision(
    text: str, name: str
) -> None:
    """accelerate leaves a forward in mixed precision on it: a merge would differ by its digits."""
    found = run(text, name, settings={"bf16": True})
    assert found.report.improved
    assert "forward" not in vars(found.model)
    ids, plain = torch.arange(30)[None], tiny_llama()
    plain.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(found.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_scale_tuning_changes_norms_and_row_scales_and_nothing_else(text: str) -> None:
    found = run(text, "scale", settings={"learning_rate": 0.02})
    assert found.report.improved
    old = dict(tiny_llama().named_parameters())
    targets = find_targets(tiny_llama(), {"input_ids": torch.arange(22).reshape(2, 11)}).layers
    for name, new in found.model.named_parameters():
        path = name.removesuffix(".weight")
        if path in targets:
            factor = new / old[name]
            assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-3)
            assert not torch.equal(new, old[name])
        elif path not in norms(tiny_llama()):
            assert torch.equal(new, old[name]), name
    assert found.report.parameters == 5 * 32 + 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


def test_full_fine_tuning_trains_everything(text: str) -> None:
    found = run(text, "full", settings={"learning_rate": 5e-3})
    assert found.report.improved
    assert found.report.parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert not any(p.requires_grad for p in found.model.parameters())


def test_training_asks_for_no_cache_and_leaves_the_config(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache turns off what keeps samples apart; a config of parts has its switch inside."""
    asked: list[Any] = []
    forward = LlamaForCausalLM.forward

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        asked.append(options.get("use_cache"))
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", noted)
    found = run(text, "full", settings={"steps": 1})
    assert asked
    assert set(asked) == {False}
    assert found.model.config.use_cache


@pytest.mark.parametrize("name", ["lora", "full"])
def test_what_did_not_get_better_is_returned_as_it_was(text: str, name: str) -> None:
    said: list[str] = []

    class Says:
        def message(self, line: str) -> None:
            said.append(line)

        def task(self, description: str, total: int | None = None) -> Any:
            from prunec.events import silent

            return silent.task(description, total)

    settings = {"learning_rate": 30.0, "warmup_steps": 0, "schedule": "constant"}
    settings |= {"evaluate_every": 4}  # by then nothing is left of the model
    found = run(text, name, settings=settings, progress=Says())
    assert not found.report.improved
    assert found.report.after == found.report.before
    assert any("did not lower" in line for line in said)
    for new, old in zip(found.model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(new, old)


def test_an_interrupted_run_goes_on_to_the_same_curve(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"dropout": 0.1}
    whole = run(text, "lora", settings=settings).report
    step = Training.training_step

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(text, "lora", settings=settings)
    again = run(text, "lora", settings=settings, resume=True).report
    for found, wanted in (
        (again.held_out_losses, whole.held_out_losses),
        (again.training, whole.training),
    ):
        assert [p.step for p in found] == [p.step for p in wanted]
        assert [p.loss for p in found] == pytest.approx([p.loss for p in wanted])
    with pytest.raises(CheckpointError, match="other settings"):
        run(text, "lora", settings={"dropout": 0.2}, resume=True)


def test_a_loss_that_no_longer_falls_ends_the_run(text: str) -> None:
    settings = {"steps": 60, "learning_rate": 0.3, "warmup_steps": 0, "schedule": "constant"}
    report = run(text, "lora", settings=settings | {"patience": 3}).report
    losses = [point.loss for point in report.held_out_losses]
    best = losses.index(min(losses[1:]))  # of the states that could be kept
    assert report.steps == report.held_out_losses[-1].step < 60
    assert len(losses) - 1 == best + 3
    assert report.after == min(losses)


def test_the_limit_that_is_reached_first_ends_the_run() -> None:
    limits = {"batch_size": 4, "steps": 50, "epochs": 2.5}
    settings = load_recovery("lora").override(limits)
    assert planned_steps(settings, rows=9) == 8  # of 3 steps an epoch
    assert planned_steps(settings, rows=900) == 50
    assert planned_steps(settings.override({"epochs": None}), rows=9) == 50
    assert planned_steps(settings.override({"steps": None}), rows=9) == 8
    assert planned_steps(settings.override({"steps": None, "epochs": None}), rows=9) is None


def test_the_epochs_end_a_run_that_has_steps_left(text: str) -> None:
    settings = load_recovery("lora").override({**TINY, "epochs": 0.01})
    found = recover(tiny_llama(), tiny_tokenizer(), text, settings, work=Path(text).parent / "work")
    assert found.report.steps == 1


def test_minutes_end_a_run(text: str) -> None:
    settings = load_recovery("lora").override({**TINY, "steps": None, "minutes": 0.05})
    found = recover(tiny_llama(), tiny_tokenizer(), text, settings, work=Path(text).parent / "work")
    assert 3 <= found.report.seconds < 20
    assert found.report.held_out_losses[-1].step == found.report.steps


def test_the_distillation_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    temperature = 2.0
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    whole = distillation_loss(student, soft_targets(teacher, temperature, 0), temperature)
    assert torch.allclose(whole, expected, rtol=1e-5)
    few = distillation_loss(student, soft_targets(teacher, temperature, 10), temperature)
    assert (few < expected).all()
    assert (few > 0).all()
    same = distillation_loss(teacher, soft_targets(teacher, temperature, 10), temperature)
    assert torch.allclose(same, torch.zeros(5), atol=1e-5)


def test_the_teacher_is_asked_once_for_a_row(text: str) -> None:
    teacher = Teacher(tiny_llama(3), temperature=1.0, top_k=8)
    ids = torch.arange(40).reshape(2, 20)
    labels = ids.clone()
    labels[1, :12] = -100
    batch = {"input_ids": ids, "labels": labels}
    first = teacher.targets(batch)
    assert teacher.misses == 2
    assert len(first.tokens) == 19 + 8 == int(learnt_positions(labels).sum())
    again = Teacher(tiny_llama(3), temperature=1.0, top_k=8)
    second = again.targets(batch)
    assert again.misses == 0
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.log_p, second.log_p)
    direct = tiny_llama(3)(ids[1:]).logits[0, 11:-1].log_softmax(-1).topk(8).values
    assert torch.allclose(first.log_p[19:], direct, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_teacher_knows_a_row_again_in_a_batch_of_longer_ones(text: str, packed: bool) -> None:
    short, long = single([Sample(torch.arange(9)), Sample(torch.arange(20))])
    teacher = Teacher(tiny_llama(3), temperature=1.0, top_k=8)
    alone = teacher.targets(collate([short], packed=packed))
    together = teacher.targets(collate([short, long], packed=packed))
    assert teacher.misses == 2
    assert torch.equal(together.tokens[:8], alone.tokens)


def test_distillation_follows_the_teacher(text: str) -> None:
    teacher = tiny_llama()
    student = tiny_llama()
    torch.manual_seed(5)
    for layer in student.model.layers:
        layer.mlp.down_proj.weight.mul_(0.2)
    found = run(
        text, "distill", student, teacher=teacher,
        settings={"hidden": 0.5, "hard": 0.1, "learning_rate": 3e-3},
    )  # fmt: skip
    assert found.report.settings.objective == "distill"
    assert found.report.steps == 8
    with pytest.raises(PlanError, match="needs the dense model"):
        run(text, "distill")


def test_layers_that_peft_refuses_are_one_message(text: str) -> None:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(vocab_size=320, **sizes)).eval().requires_grad_(False)
    with pytest.raises(PlanError, match=r"peft does not adapt this model.*out_proj"):
        run(text, "lora", model)


def test_a_merge_that_changes_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunec.errors import VerifyError

    probe = {"input_ids": torch.arange(22).reshape(2, 11)}
    adapted = attach(tiny_llama(), load_recovery("lora").override(TINY), probe)
    monkeypatch.setattr(adapted, "merge_and_unload", lambda: tiny_llama(1))
    with pytest.raises(VerifyError, match="differs from the model with its adapter"):
        merge(adapted, probe)


def test_settings_are_checked_and_papers_have_names() -> None:
    assert {"llm-pruner", "slimgpt", "slimllm"} <= set(recovery_names())
    assert load_recovery("slimllm").rank == 4
    assert load_recovery("llm-pruner").epochs == 2
    assert load_recovery("lora").override({"learning_rate": "1e-4"}).learning_rate == 1e-4
    for settings, reason in (
        ({"rnak": 3}, "no setting 'rnak'"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.5}, "whole number"),
        ({"dropout": 2}, "a part"),
        ({"batch_size": 8, "micro_batch": 3}, "does not divide"),
        ({"schedule": "square"}, "schedule is 'square'"),
    ):
        with pytest.raises(PlanError, match=reason):
            load_recovery("lora").override(settings)
    with pytest.raises(PlanError, match="no recovery method or recipe 'lroa'") as caught:
        load_recovery("lroa")
    assert "lora" in str(caught.value)
    assert "slimllm" in str(caught.value)
