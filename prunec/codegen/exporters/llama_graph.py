"""The LLaMA graph with sizes of its own in every layer: what GGUF's and DeciLM's `deci` express.

Whether a model is one is not looked up by its name: its parameters must be those of the graph, and
the graph, computed here in plain torch, must give the model's logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunec.codegen.battery import difference, tolerance
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import expected, named_forward
from prunec.codegen.streamed import in_single
from prunec.errors import ExportError

_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
_PROBE = 16  # tokens of the comparison


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer; no heads or no width: that part was removed."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class LlamaGraph:
    """A model that is the LLaMA graph.

    Attributes:
        layers: their sizes.
        frequencies: [head_dim / 2], radians a position, as the model's rotary module has them.
        theta: the base they were made from.
        tied: the LM head is the embedding.
        tensors: parameters by their names in the model, tied ones once.
    """

    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    theta: float
    tied: bool
    frequencies: Tensor = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)

    def weight(self, layer: int, path: str, kind: str = "weight") -> Tensor | None:
        """A parameter of a layer, such as ("mlp.up_proj"); None where it has none."""
        return self.tensors.get(f"model.layers.{layer}.{path}.{kind}")

    @property
    def biases(self) -> list[str]:
        """The sub-layers, such as "mlp.down_proj", that carry a bias somewhere."""
        named = (n.split(".", 3)[3] for n in self.tensors if n.startswith("model.layers."))
        return sorted({name.removesuffix(".bias") for name in named if name.endswith(".bias")})

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Float32 [batch, sequence, vocabulary] of token ids [batch, sequence]."""
        hidden = F.embedding(ids, self.tensors["model.embed_tokens.weight"].float())
        angle = torch.arange(ids.shape[1])[:, None] * self.frequencies.float()
        turn = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        for index, sizes in enumerate(self.layers):
            if sizes.heads:
                hidden = hidden + self._attention(
                    index, sizes, self._norm(index, "self_attn", hidden), turn
                )
            if sizes.width:
                normed = self._norm(index, "mlp", hidden)
                gate = F.silu(self._linear(index, "mlp.gate_proj", normed))
                up = self._linear(index, "mlp.up_proj", normed)
                hidden = hidden + self._linear(index, "mlp.down_proj", gate * up)
        hidden = self._rms(hidden, self.tensors["model.norm.weight"])
        return F.linear(hidden, self.head.float())

    @property
    def head(self) -> Tensor:
        """The LM head's weight [vocabulary, hidden]."""
        return self.tensors["model.embed_tokens.weight" if self.tied else "lm_head.weight"]

    def _attention(
        self, index: int, sizes: Layer, x: Tensor, turn: tuple[Tensor, Tensor]
    ) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            self._linear(index, f"self_attn.{name}_proj", x)
            .view(batch, length, -1, self.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        repeats = sizes.heads // sizes.kv_heads
        out = F.scaled_dot_product_attention(
            _rotated(query, *turn),
            _rotated(key, *turn).repeat_interleave(repeats, 1),
            value.repeat_interleave(repeats, 1),
            is_causal=True,
        )
        return self._linear(index, "self_attn.o_proj", out.transpose(1, 2).flatten(2))

    def _linear(self, index: int, path: str, x: Tensor) -> Tensor:
        weight, bias = self.weight(index, path), self.weight(index, path, "bias")
        assert weight is not None
        return F.linear(x, weight.float(), None if bias is None else bias.float())

    def _norm(self, index: int, part: str, x: Tensor) -> Tensor:
        weight = self.weight(index, _NORMS[part])
        assert weight is not None
        return self._rms(x, weight)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden,), weight.float(), self.epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def llama_graph(source: ModelDirectory) -> LlamaGraph:
    """The model as a LLaMA graph, proven on random tokens.

    Raises:
        ExportError: it is none; `where` says why.
    """
    config: Any = getattr(source.model, "config", None)
    strange = _strangers(source.model.state_dict())
    if strange:
        raise _none(f"it has {len(strange)} parameters that the LLaMA graph lacks: {strange[0]}")
    named = dict(source.model.named_parameters(remove_duplicate=False))
    tied = named["lm_head.weight"] is named["model.embed_tokens.weight"]
    tensors = {n: p.detach() for n, p in named.items() if not (tied and n == "lm_head.weight")}
    rotary = [m for m in source.model.modules() if hasattr(m, "inv_freq")]
    if len(rotary) != 1:
        raise _none(f"it has {len(rotary)} rotary embeddings")
    if getattr(rotary[0], "attention_scaling", 1.0) != 1.0:
        raise _none("its rotary embedding scales attention")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise _none(f"its rotary frequencies change with the length ({rope['rope_type']})")
    frequencies = rotary[0].inv_freq
    assert isinstance(frequencies, Tensor)
    graph = LlamaGraph(
        layers=tuple(_layers(tensors, 2 * len(frequencies), int(config.num_hidden_layers))),
        hidden=int(config.hidden_size),
        head_dim=2 * len(frequencies),
        vocabulary=len(tensors["model.embed_tokens.weight"]),
        context=int(config.max_position_embeddings),
        epsilon=float(getattr(config, "rms_norm_eps", 1e-6)),
        theta=float(rope.get("rope_theta", 10000.0)),
        tied=tied,
        frequencies=frequencies,
        tensors=tensors,
    )
    _prove(graph, source)
    return graph


def _strangers(names: Mapping[str, Tensor]) -> list[str]:
    """Names that are none of the graph's; or those of the graph that are missing."""
    whole = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    linear = "|".join(f"{part}\\.({'|'.join(own)})" for part, own in _PARTS.items())
    norms = "|".join(_NORMS.values())
    layer = re.compile(rf"model\.layers\.\d+\.((({linear})\.(weight|bias))|(({norms})\.weight))")
    strange = [name for name in names if name not in whole and not layer.fullmatch(name)]
    return strange or [f"none of the name {name}" for name in sorted(whole - names.keys())]


def _layers(tensors: Mapping[str, Tensor], head_dim: int, count: int) -> list[Layer]:
    found = []
    for index in range(count):
        own = f"model.layers.{index}"
        rows = [
            len(tensors[name]) if (name := f"{own}.{path}.weight") in tensors else 0
            for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        ]
        heads, kv_heads = rows[0] // head_dim, rows[1] // head_dim
        if rows[0] % head_dim or rows[1] % head_dim or (heads and heads % max(kv_heads, 1)):
            raise _none(
                f"layer {index}: {rows[0]} query and {rows[1]} key features are no whole heads"
            )
        found.append(Layer(heads, kv_heads, rows[2]))
    return found


def _prove(graph: LlamaGraph, source: ModelDirectory) -> None:
    length = min(_PROBE, graph.context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.vocabulary, (1, length), generator=generator)
    with in_single(source.model, None) as model:
        wanted = expected(named_forward(model, ["input_ids"]), {"input_ids": ids})
        limit = tolerance(model)
    gap = difference([graph.logits(ids)], [wanted.float()])
    if not gap <= limit:
        raise _none(f"as a LLaMA graph its logits would be off by {gap:.1e} of the largest")


def _none(reason: str) -> ExportError:
    return ExportError("the model is not the LLaMA graph", where=reason)
