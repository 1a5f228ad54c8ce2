"""What users do with a delivered directory, by transformers and its friends alone.

The tiny model runs always; SmolLM2 pruned to 50 %, heads and widths different in every layer, runs
with the slow tests. It is opened as its own code says, with trust_remote_code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from exporting import saved, written
from slicing import UNITS, by_plan, coupling_of, example_for, random_plan

from prunec.codegen.battery import difference

# transformers 5.2x renamed it; peft and TrainingArguments of other versions say it as before
RENAMED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delivery") / "pruned"
    if request.param == "tiny":
        written("llama_square", folder)
        return folder
    from prunec.codegen.shrink import shrink
    from prunec.models import open_model

    source = open_model("smollm2")
    coupling = coupling_of(source.model, source.example)
    plan = random_plan(coupling, UNITS)
    result = shrink(source.model, by_plan(source.model, coupling, plan), example=source.example)
    saved(result, folder, tokenizer=source.tokenizer)
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def opened(directory: Path, **options: Any) -> Any:
    model = T.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)
    return model.eval()


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(inputs or example_for(model))).logits
    return found


def test_caches_and_beams(directory: Path) -> None:
    model = opened(directory)
    ids = example_for(model)["input_ids"]
    tokens = model.generate(ids, **GREEDY)
    for other in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **GREEDY, **other), tokens)
    beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(ids, **GREEDY, num_beams=3, use_cache=False), beams)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding(directory: Path, attention: str) -> None:
    """A padded row gives what it gives alone."""
    model = opened(directory, attn_implementation=attention)
    ids = example_for(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = logits(model, input_ids=ids[:1, 5:])
    assert difference([padded[:1, 5:]], [alone]) < 1e-4


def test_saved_again_and_half_precision(directory: Path, tmp_path: Path) -> None:
    model = opened(directory)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))
    half = opened(directory, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert difference([logits(half).float()], [logits(model)]) < 0.1


def test_offloaded_to_disk(directory: Path, tmp_path: Path) -> None:
    wanted = opened(directory)
    places = {name: "disk" for name, _ in wanted.named_children()}
    if wanted.config.tie_word_embeddings:  # as accelerate wants it
        layers = {f"model.layers.{i}": "disk" for i in range(wanted.config.num_hidden_layers)}
        places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", **layers}
        places["model.rotary_emb"] = "cpu"
    model = opened(directory, device_map=places, offload_folder=tmp_path / "offload")
    assert difference([logits(model)], [logits(wanted)]) < 1e-5


def test_compiled(directory: Path) -> None:
    model = opened(directory)
    compiled = torch.compile(model, backend="aot_eager")
    try:
        assert difference([logits(compiled, **example_for(model))], [logits(model)]) < 1e-5
    finally:
        torch._dynamo.reset()


def test_pipeline(directory: Path) -> None:
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("the tiny model's vocabulary is smaller than the tiny tokenizer's")
    tokenizer = T.AutoTokenizer.from_pretrained(directory)
    text = T.pipeline("text-generation", model=opened(directory), tokenizer=tokenizer)
    assert len(text("The capital of France", max_new_tokens=4)[0]["generated_text"]) > 21


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 15) + index
        return {"input_ids": ids, "labels": ids}


@RENAMED
def test_trainer_with_gradient_checkpointing(directory: Path, tmp_path: Path) -> None:
    arguments = T.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = T.Trainer(model=opened(directory).train(), args=arguments, train_dataset=Rows())
    assert trainer.train().training_loss > 0
    again = opened(tmp_path / "run" / "checkpoint-3")
    assert torch.equal(logits(again), logits(trainer.model.eval()))


@RENAMED
@pytest.mark.engine("peft")
def test_lora(directory: Path, tmp_path: Path) -> None:
    """Trained, saved, loaded onto the directory again, merged."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)  # peft's own target modules for the type
    model = peft.get_peft_model(opened(directory), config)
    batch = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model.eval(), input_ids=batch["input_ids"])
    again = peft.PeftModel.from_pretrained(opened(directory), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, input_ids=batch["input_ids"]), trained)
    merged = again.merge_and_unload()
    assert difference([logits(merged, input_ids=batch["input_ids"])], [trained]) < 1e-4
    assert not torch.equal(trained, logits(opened(directory), input_ids=batch["input_ids"]))
