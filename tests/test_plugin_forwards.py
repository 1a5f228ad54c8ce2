"""The forwards of examples/plugin_forwards: classes that export cannot follow are traced exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from zoo import configs

from prunec import registry
from prunec.errors import TraceError
from prunec.graph.coupling import couple
from prunec.graph.forwards import traceable
from prunec.graph.trace import trace
from prunec.passes.oracles.mask import relative_difference

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin_forwards"


class Counting(nn.Module):
    """As many steps as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return sum((row for row in x if row.sum() > 0), self.up(x))


class Derived(Counting):
    pass


def always(self: Counting, x: Tensor) -> Tensor:
    return self.up(x)


@pytest.fixture
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    import prunec.graph.forwards as module

    monkeypatch.setattr(module, "names", lambda group: ["Counting"])
    monkeypatch.setattr(module, "plugin", lambda group, name: always)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("plugin")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-index", "--no-build-isolation", "--target", folder, EXAMPLE),
        ],
        check=True,
    )
    sys.path.append(str(folder))
    registry._declared.cache_clear()
    yield
    sys.path.remove(str(folder))
    registry._declared.cache_clear()


@pytest.mark.usefixtures("_declared")
@pytest.mark.parametrize("cls", [Counting, Derived])
def test_a_declared_forward_is_traced_and_the_module_is_left_as_it_was(
    cls: type[nn.Module],
) -> None:
    model = cls().requires_grad_(False)
    program = trace(model, torch.ones(2, 4))
    assert torch.equal(program.run(None, **program.example), model.up(torch.ones(2, 4)))
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("_declared")
def test_a_forward_of_the_instance_comes_back() -> None:
    model = Counting()
    own = MethodType(lambda self, x: x, model)
    model.forward = own
    with traceable(model):
        assert model.forward is not own
    assert model.forward is own


def test_without_a_plugin_it_is_refused_and_the_page_that_helps_is_named() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Counting(), torch.ones(2, 4))
    assert "docs/rules.md" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("dbrx", {"expert", "ffn_channel", "kv_group"}),
        ("longcat_flash", {"ffn_channel", "query_head"}),
        ("seq2seq/switch_transformers", {"ffn_channel", "head"}),
        pytest.param("blt", {"ffn_channel", "kv_group"}, marks=pytest.mark.slow),
        pytest.param("qwen4_exp_text", {"expert", "kv_group"}, marks=pytest.mark.slow),
    ],
)
def test_the_traced_graph_is_the_class_itself(model_type: str, kinds: set[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        model = configs.build(model_type)
        for parameter in model.parameters():  # so that tokens go to other experts, other blocks
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    inputs = configs.inputs_of(model_type, model)
    program = trace(model, inputs)
    eager = model(**inputs, use_cache=False).logits
    assert relative_difference(program.run(None, **inputs), eager) < 1e-5
    assert kinds <= {group.kind for group in couple(program).groups}
