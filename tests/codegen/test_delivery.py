"""What users do with a delivered directory, by transformers and its friends alone.

The tiny models run always; SmolLM2 pruned to 20 and to 50 %, heads, KV groups and widths different
in every layer, one attention and one MLP gone, with the slow tests. They are opened as their own
code says, with trust_remote_code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from delivered import SMOLLM2, TINY
from safetensors.torch import load_file

from prunec.codegen.battery import difference

# transformers 5.2x renamed it; peft and TrainingArguments of other versions say it as before
RENAMED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
REAL = [pytest.param(name, marks=pytest.mark.slow) for name in SMOLLM2]


@pytest.fixture(scope="module", params=[*TINY, *REAL])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(name: str, delivery: Callable[[str], Path]) -> Path:
    return delivery(name)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def opened(directory: Path, **options: Any) -> Any:
    model = T.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(inputs or {"input_ids": tokens()})).logits
    return found


STRANGER = """
import sys, torch, transformers
from safetensors.torch import save_file
sys.modules["prunec"] = None
torch.set_num_threads(1)
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = torch.tensor([list(map(int, sys.argv[3].split(",")))])
with torch.no_grad():
    found = {"logits": model.eval()(ids).logits}
found["tokens"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
save_file(found, sys.argv[2])
"""


def test_a_fresh_process_without_prunec(directory: Path, tmp_path: Path) -> None:
    """Against the model as prunec itself loads it."""
    import prunec

    ids = tokens()[:1]
    command = [sys.executable, "-P", "-c", STRANGER, str(directory), str(tmp_path / "found")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([*command, ",".join(map(str, ids[0].tolist()))], env=environment, check=True)
    found = load_file(tmp_path / "found")
    model = prunec.load(directory)
    assert difference([found["logits"]], [logits(model, input_ids=ids)]) < 1e-6
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(found["tokens"], wanted)


def test_sizes_differ_and_two_parts_are_gone(name: str, directory: Path) -> None:
    """What the rows below are worth depends on it."""
    config = json.loads((directory / "config.json").read_text())
    rows = config["per_layer_config"].values()
    for field in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert len({row.get(field) for row in rows}) > 1
    gone = 0 if name == "tiny" else 2
    assert len(json.loads((directory / "plan.json").read_text()).get("dropped", ())) == gone
    before, after = json.loads((directory / "prunec.json").read_text())["report"][
        "block_parameters"
    ]
    if name in SMOLLM2:
        assert 100 * (after / before - 1) == pytest.approx(float(name[8:-1]), abs=2)


def test_caches_and_beams(directory: Path) -> None:
    model = opened(directory)
    ids = tokens()
    greedy = model.generate(ids, **GREEDY)
    for other in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **GREEDY, **other), greedy)
    beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(ids, **GREEDY, num_beams=3, use_cache=False), beams)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding(directory: Path, attention: str) -> None:
    """A padded row gives what it gives alone."""
    model = opened(directory, attn_implementation=attention)
    ids = tokens()
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
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(half), logits(model))


def test_offloaded_to_disk(directory: Path, tmp_path: Path) -> None:
    wanted = opened(directory)
    places = {name: "disk" for name, _ in wanted.named_children()}
    if wanted.config.tie_word_embeddings:  # as accelerate wants it
        layers = {f"model.layers.{i}": "disk" for i in range(wanted.config.num_hidden_layers)}
        places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", **layers}
        places["model.rotary_emb"] = "cpu"
    model = opened(directory, device_map=places, offload_folder=tmp_path / "offload")
    assert difference([logits(model)], [logits(wanted)]) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(directory: Path, backend: str) -> None:
    model = opened(directory)
    compiled = torch.compile(model, backend=backend)
    # inductor sums in another order, and SmolLM2 cut at random in fp32 is 6e-5 from itself in fp64
    limit = 1e-4 if backend == "inductor" else 1e-5
    try:
        assert difference([logits(compiled, input_ids=tokens())], [logits(model)]) < limit
    finally:
        torch._dynamo.reset()


def test_pipeline(directory: Path) -> None:
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
    assert difference([logits(merged, input_ids=batch["input_ids"])], [trained]) < 1e-3
    assert not torch.equal(trained, logits(opened(directory), input_ids=batch["input_ids"]))


ROWS = [("The dog sleeps on", " the lazy fox"), ("The quick brown", " fox jumps over the dog")]
TASK = """task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
metadata: {version: 1.0}
"""
EVALUATE = "sys.modules['prunec'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.mark.slow
@pytest.mark.engine("lm-eval")
def test_lm_eval(directory: Path, tmp_path: Path) -> None:
    """Its own command line gives what the logits give."""
    rows = [json.dumps({"text": text, "target": target}) for text, target in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "toy.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    command = [sys.executable, "-P", "-c", f"import sys; {EVALUATE}", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={directory},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tmp_path), "--tasks", "toy", "--device", "cpu"]
    folders = {"HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in folders.items()}
    output = ["--output_path", str(tmp_path / "out.json")]
    subprocess.run([*command, *output], env=environment, check=True)
    (report,) = tmp_path.glob("out*.json")
    found = json.loads(report.read_text())["results"]["toy"]["perplexity,none"]
    model, tokenizer = opened(directory), T.AutoTokenizer.from_pretrained(directory)
    likelihoods = []
    for text, target in ROWS:
        start = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(text + target)["input_ids"]])
        scores = logits(model, input_ids=ids)[0, start - 1 : -1].log_softmax(-1)
        likelihoods.append(scores.gather(-1, ids[0, start:, None]).sum())
    assert found == pytest.approx(float(torch.stack(likelihoods).mean().neg().exp()), rel=1e-3)
