"""Groups of real architectures: names, kinds, companions, minimum sizes, pins and their lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as T
from expecttest import assert_expected_inline
from programs import describe
from torch import nn

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.paths import block_of, blocks_of
from prunec.graph.trace import trace

TOKENS = {"input_ids": torch.arange(5, 27).reshape(2, 11)}
DECODER = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def coupling_of(model: nn.Module) -> CouplingGraph:
    return couple(trace(model.eval().requires_grad_(False), TOKENS))


@pytest.fixture(scope="module")
def llama() -> CouplingGraph:
    with seeded():
        return coupling_of(T.LlamaForCausalLM(T.LlamaConfig(**DECODER, tie_word_embeddings=True)))


def test_grouped_query_attention_with_tied_embeddings(llama: CouplingGraph) -> None:
    assert_expected_inline(
        describe(llama),
        """\
model/hidden 48: model.embed_tokens.weight[1] model.layers.0.self_attn.q_proj.weight[1]
    model.layers.0.self_attn.k_proj.weight[1] model.layers.0.self_attn.v_proj.weight[1]
    model.layers.0.self_attn.o_proj.weight[0] model.layers.0.mlp.gate_proj.weight[1]
    model.layers.0.mlp.up_proj.weight[1] model.layers.0.mlp.down_proj.weight[0]
    model.layers.0.input_layernorm.weight[0] model.layers.0.post_attention_layernorm.weight[0]
    model.layers.1.self_attn.q_proj.weight[1] model.layers.1.self_attn.k_proj.weight[1]
    model.layers.1.self_attn.v_proj.weight[1] model.layers.1.self_attn.o_proj.weight[0]
    model.layers.1.mlp.gate_proj.weight[1] model.layers.1.mlp.up_proj.weight[1]
    model.layers.1.mlp.down_proj.weight[0] model.layers.1.input_layernorm.weight[0]
    model.layers.1.post_attention_layernorm.weight[0] model.norm.weight[0]; normalised
model.layers.0.self_attn/kv_group 3: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.k_proj.weight[0] model.layers.0.self_attn.v_proj.weight[0]
    model.layers.0.self_attn.o_proj.weight[1]
model.layers.0.self_attn/query_head 2: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.o_proj.weight[1]; companions model.layers.0.self_attn/kv_group
model/rope_pair 4: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.k_proj.weight[0] model.layers.1.self_attn.q_proj.weight[0]
    model.layers.1.self_attn.k_proj.weight[0] model.rotary_emb.inv_freq[0]
model.layers.0.self_attn/value_dim 8: model.layers.0.self_attn.v_proj.weight[0]
    model.layers.0.self_attn.o_proj.weight[1]; companions model.layers.0.self_attn/kv_group
model.layers.0.mlp/ffn_channel 40: model.layers.0.mlp.gate_proj.weight[0]
    model.layers.0.mlp.up_proj.weight[0] model.layers.0.mlp.down_proj.weight[1]
model.layers.1.self_attn/kv_group 3: model.layers.1.self_attn.q_proj.weight[0]
    model.layers.1.self_attn.k_proj.weight[0] model.layers.1.self_attn.v_proj.weight[0]
    model.layers.1.self_attn.o_proj.weight[1]
model.layers.1.self_attn/query_head 2: model.layers.1.self_attn.q_proj.weight[0]
    model.layers.1.self_attn.o_proj.weight[1]; companions model.layers.1.self_attn/kv_group
model.layers.1.self_attn/value_dim 8: model.layers.1.self_attn.v_proj.weight[0]
    model.layers.1.self_attn.o_proj.weight[1]; companions model.layers.1.self_attn/kv_group
model.layers.1.mlp/ffn_channel 40: model.layers.1.mlp.gate_proj.weight[0]
    model.layers.1.mlp.up_proj.weight[0] model.layers.1.mlp.down_proj.weight[1]
pinned model.embed_tokens.weight[0] 61: addressed by position
""",
    )


def test_names_are_stable_and_found(llama: CouplingGraph) -> None:
    group = llama["model.layers.1.mlp/ffn_channel"]
    assert (group.kind, group.size, group.block) == ("ffn_channel", 40, "model.layers.1")
    assert "model/hidden" in llama
    assert llama["model/hidden"].block is None
    assert llama["model/hidden"].normalised
    with pytest.raises(PlanError, match=r"no group 'model\.layers\.1\.mlp/ffn'") as caught:
        llama["model.layers.1.mlp/ffn"]
    assert "model.layers.1.mlp/ffn_channel" in str(caught.value.fix)


def test_pinned_axes_say_why_and_where(llama: CouplingGraph) -> None:
    (tokens,) = [pin for pin in llama.pinned if pin.parameter.endswith("embed_tokens.weight")]
    assert (tokens.axis, tokens.size) == (0, 61)
    assert tokens.reason == "addressed by position"
    assert tokens.where.startswith("model.embed_tokens (")


def test_the_graph_has_a_component_a_group(llama: CouplingGraph) -> None:
    graph = llama.graph
    node = graph.nodes["model.layers.0.mlp.down_proj.weight[1]"]
    assert node["groups"] == ["model.layers.0.mlp/ffn_channel"]
    assert node["dims"] == "40"
    operators = {data["op"] for _, _, data in graph.edges(data=True)}
    assert "aten.linear.default" in operators


def test_fused_projections() -> None:
    config = T.GPT2Config(vocab_size=61, n_positions=64, n_embd=48, n_layer=1, n_head=6)
    with seeded():
        coupling = coupling_of(T.GPT2LMHeadModel(config))
    assert_expected_inline(
        describe(coupling),
        """\
transformer/hidden 48: transformer.wte.weight[1] transformer.wpe.weight[1]
    transformer.h.0.ln_1.weight[0] transformer.h.0.ln_1.bias[0]
    transformer.h.0.attn.c_attn.weight[0] transformer.h.0.attn.c_proj.weight[1]
    transformer.h.0.attn.c_proj.bias[0] transformer.h.0.ln_2.weight[0]
    transformer.h.0.ln_2.bias[0] transformer.h.0.mlp.c_fc.weight[0]
    transformer.h.0.mlp.c_proj.weight[1] transformer.h.0.mlp.c_proj.bias[0]
    transformer.ln_f.weight[0] transformer.ln_f.bias[0]; normalised
transformer.h.0.attn/head 6: transformer.h.0.attn.c_attn.weight[1]
    transformer.h.0.attn.c_attn.bias[0] transformer.h.0.attn.c_proj.weight[0]
transformer.h.0.attn.c_attn/qk_dim 8: transformer.h.0.attn.c_attn.weight[1]
    transformer.h.0.attn.c_attn.bias[0]; companions transformer.h.0.attn/head
transformer.h.0.attn/value_dim 8: transformer.h.0.attn.c_attn.weight[1]
    transformer.h.0.attn.c_attn.bias[0] transformer.h.0.attn.c_proj.weight[0]; companions
    transformer.h.0.attn/head
transformer.h.0.mlp/ffn_channel 192: transformer.h.0.mlp.c_fc.weight[1]
    transformer.h.0.mlp.c_fc.bias[0] transformer.h.0.mlp.c_proj.weight[0]
pinned transformer.wte.weight[0] 61: addressed by position
pinned transformer.wpe.weight[0] 64: addressed by position
""",
    )


def test_experts_and_a_shared_one() -> None:
    config = T.Qwen2MoeConfig(
        **{**DECODER, "num_hidden_layers": 1},
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
    )
    with seeded():
        coupling = coupling_of(T.Qwen2MoeForCausalLM(config))
    assert_expected_inline(
        describe(coupling),
        """\
hidden 48: model.embed_tokens.weight[1] model.layers.0.self_attn.q_proj.weight[1]
    model.layers.0.self_attn.k_proj.weight[1] model.layers.0.self_attn.v_proj.weight[1]
    model.layers.0.self_attn.o_proj.weight[0] model.layers.0.mlp.gate.weight[1]
    model.layers.0.mlp.experts.gate_up_proj[2] model.layers.0.mlp.experts.down_proj[1]
    model.layers.0.mlp.shared_expert.gate_proj.weight[1]
    model.layers.0.mlp.shared_expert.up_proj.weight[1]
    model.layers.0.mlp.shared_expert.down_proj.weight[0]
    model.layers.0.mlp.shared_expert_gate.weight[1] model.layers.0.input_layernorm.weight[0]
    model.layers.0.post_attention_layernorm.weight[0] model.norm.weight[0] lm_head.weight[1];
    normalised
model.layers.0.self_attn/kv_group 3: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.q_proj.bias[0] model.layers.0.self_attn.k_proj.weight[0]
    model.layers.0.self_attn.k_proj.bias[0] model.layers.0.self_attn.v_proj.weight[0]
    model.layers.0.self_attn.v_proj.bias[0] model.layers.0.self_attn.o_proj.weight[1]
model.layers.0.self_attn/query_head 2: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.q_proj.bias[0] model.layers.0.self_attn.o_proj.weight[1];
    companions model.layers.0.self_attn/kv_group
model/rope_pair 4: model.layers.0.self_attn.q_proj.weight[0]
    model.layers.0.self_attn.q_proj.bias[0] model.layers.0.self_attn.k_proj.weight[0]
    model.layers.0.self_attn.k_proj.bias[0] model.rotary_emb.inv_freq[0]
model.layers.0.self_attn/value_dim 8: model.layers.0.self_attn.v_proj.weight[0]
    model.layers.0.self_attn.v_proj.bias[0] model.layers.0.self_attn.o_proj.weight[1];
    companions model.layers.0.self_attn/kv_group
model.layers.0.mlp/expert 5: model.layers.0.mlp.gate.weight[0]
    model.layers.0.mlp.experts.gate_up_proj[0] model.layers.0.mlp.experts.down_proj[0]; minimum
    2; normalised
model.layers.0.mlp.experts/ffn_channel 20: model.layers.0.mlp.experts.gate_up_proj[1]
    model.layers.0.mlp.experts.down_proj[2]
model.layers.0.mlp.shared_expert/ffn_channel 28:
    model.layers.0.mlp.shared_expert.gate_proj.weight[0]
    model.layers.0.mlp.shared_expert.up_proj.weight[0]
    model.layers.0.mlp.shared_expert.down_proj.weight[1]
pinned model.embed_tokens.weight[0] 61: addressed by position
pinned lm_head.weight[0] 61: an axis of the output
""",
    )


def test_a_convolutional_network_without_transformers() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.expand = nn.Conv2d(width, 14, 1)
            self.depth = nn.Conv2d(14, 14, 3, padding=1, groups=14)
            self.norm = nn.BatchNorm2d(14)
            self.project = nn.Conv2d(14, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.project(self.norm(self.depth(self.expand(x)).relu()))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 10, 3)
            self.blocks = nn.ModuleList(Block(10) for _ in range(2))
            self.head = nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    with seeded():
        coupling = couple(trace(Network(), torch.randn(2, 3, 8, 8)))
    assert_expected_inline(
        describe(coupling),
        """\
hidden 10: stem.weight[0] stem.bias[0] blocks.0.expand.weight[1] blocks.0.project.weight[0]
    blocks.0.project.bias[0] blocks.1.expand.weight[1] blocks.1.project.weight[0]
    blocks.1.project.bias[0] head.weight[1]
blocks.0/conv_channel 14: blocks.0.expand.weight[0] blocks.0.expand.bias[0]
    blocks.0.depth.weight[0] blocks.0.depth.bias[0] blocks.0.norm.weight[0]
    blocks.0.norm.bias[0] blocks.0.project.weight[1] blocks.0.norm.running_mean[0]
    blocks.0.norm.running_var[0]
blocks.1/conv_channel 14: blocks.1.expand.weight[0] blocks.1.expand.bias[0]
    blocks.1.depth.weight[0] blocks.1.depth.bias[0] blocks.1.norm.weight[0]
    blocks.1.norm.bias[0] blocks.1.project.weight[1] blocks.1.norm.running_mean[0]
    blocks.1.norm.running_var[0]
pinned stem.weight[1] 3: an axis of the input
pinned stem.weight[2] 3: a kernel position
pinned stem.weight[3] 3: a kernel position
pinned blocks.0.depth.weight[2] 3: a kernel position
pinned blocks.0.depth.weight[3] 3: a kernel position
pinned blocks.1.depth.weight[2] 3: a kernel position
pinned blocks.1.depth.weight[3] 3: a kernel position
pinned head.weight[0] 4: an axis of the output
pinned head.bias[0] 4: an axis of the output
""",
    )


def test_shared_layers_are_one_group() -> None:
    config = T.AlbertConfig(
        vocab_size=61,
        embedding_size=20,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    with seeded():
        coupling = coupling_of(T.AlbertForMaskedLM(config))
    assert_expected_inline(
        "".join(f"{g.name} {g.size}\n" for g in coupling.groups),
        """\
ffn_channel 20
hidden 48
albert.encoder.albert_layer_groups.0.albert_layers.0.attention/head 6
albert.encoder.albert_layer_groups.0.albert_layers.0.attention/qk_dim 8
albert.encoder.albert_layer_groups.0.albert_layers.0.attention/value_dim 8
albert.encoder.albert_layer_groups.0.albert_layers.0/ffn_channel 40
""",
    )


def test_weights_that_the_forward_does_not_read_are_pinned() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
            self.unused = nn.Linear(10, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    coupling = couple(trace(Network(), torch.randn(2, 6)))
    assert [group.name for group in coupling.groups] == ["ffn_channel"]
    unused = [pin for pin in coupling.pinned if pin.parameter.startswith("unused")]
    assert {pin.reason for pin in unused} == {"the traced forward does not read it"}


def test_attention_that_no_output_depends_on_is_no_part_of_the_program() -> None:
    """As in the vision tower of LLaVA, which runs a layer more than it reads."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(6, 6)
            self.unread = nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = self.unread(x).unflatten(-1, (2, 4)).transpose(1, 2)
            nn.functional.scaled_dot_product_attention(mixed, mixed, mixed)
            return self.read(x)

    program = trace(Unread().eval(), {"x": torch.randn(2, 5, 6)})
    assert not [node for node in program.graph.nodes if "attention" in node.name]
    members = {m.parameter for g in couple(program).groups for m in g.members}
    assert not [name for name in members if name.startswith("unread")]


def test_blocks_are_the_outermost_indexed_modules() -> None:
    assert block_of("model.layers.3.mlp.experts.7.up") == "model.layers.3"
    assert block_of("model.embed_tokens.weight") is None
    assert blocks_of(["h.0.a", "h.1.a", "h.0.b", "norm"]) == {
        "h.0": ["h.0.a", "h.0.b"],
        "h.1": ["h.1.a"],
    }


def test_a_model_on_meta_couples_as_a_loaded_one(llama: CouplingGraph) -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = T.LlamaForCausalLM(T.LlamaConfig(**DECODER, tie_word_embeddings=True))
    model.tie_weights()
    assert describe(coupling_of(model)) == describe(llama)
