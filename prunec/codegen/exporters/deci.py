"""DeciLM's ``block_configs`` directory, which vLLM, SGLang, TensorRT-LLM and mlx-lm read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.llama_graph import Layer, LlamaGraph, llama_graph
from prunec.codegen.exporters.source import ModelDirectory
from prunec.errors import ExportError

_ROUND = 256  # those engines round the width up to a multiple of it


@dataclass(frozen=True)
class Deci:
    """LLaMA with KV heads and FFN width by layer; query heads are the same in all of them."""

    file: ClassVar[str] = "config.json"
    alone: ClassVar[bool] = False

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        try:
            return list(_reasons(source.once(llama_graph)))
        except ExportError as error:
            return [error.where or error.message]

    def needed_bytes(self, source: ModelDirectory) -> int:
        return source.weight_bytes

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        graph = source.once(llama_graph)
        config = json.dumps(_config(graph, source), indent=2) + "\n"
        (folder / self.file).write_text(config, encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in graph.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source.copy_tokenizer(folder)
        if heads(graph) * graph.head_dim == graph.hidden:
            return []
        return ["mlx-lm takes the head size as hidden size / heads, so it cannot open this one"]

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """The sizes that those engines will read from the file, by their own rounding rule."""
        config = json.loads((folder / self.file).read_text(encoding="utf-8"))
        graph = source.once(llama_graph)
        assert sizes_read(config) == list(graph.layers), "the config says other sizes"
        return Finding("vLLM, SGLang, TensorRT-LLM, mlx-lm", "engine absent", _UNRUN)


_UNRUN = "not run there; the sizes by those engines' own rule are the model's"


def heads(graph: LlamaGraph) -> int:
    """Query heads of the layers that have attention."""
    return max(layer.heads for layer in graph.layers)


def _reasons(graph: LlamaGraph) -> Iterator[str]:
    most = heads(graph)
    other = [i for i, layer in enumerate(graph.layers) if layer.heads not in (0, most)]
    if other:
        yield f"all layers must have {most} query heads, not so: {_listed(other)}"
    odd = [i for i, layer in enumerate(graph.layers) if layer.width % _ROUND]
    if odd:
        yield f"FFN widths must be multiples of {_ROUND}, not so: {_listed(odd)}"
    for part in ("self_attn", "mlp"):
        biased = [name for name in graph.biases if name.startswith(part)]
        if biased:
            yield f"these engines read no biases of {', '.join(biased)}"


def _listed(layers: Sequence[int]) -> str:
    return "layer " + ", ".join(map(str, layers[:12])) + (", ..." if len(layers) > 12 else "")


def _config(graph: LlamaGraph, source: ModelDirectory) -> dict[str, Any]:
    dropped = ("prunec", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access")
    most = heads(graph)
    return {
        **{name: value for name, value in source.config.items() if name not in dropped},
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_attention_heads": most,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "head_dim": graph.head_dim,
        "block_configs": [_block(layer, most, graph.hidden) for layer in graph.layers],
    }


def _block(layer: Layer, most: int, hidden: int) -> dict[str, Any]:
    group = most // layer.kv_heads if layer.kv_heads else None
    # half a feature less: they floor the product, then round it up
    factor = 3 * (layer.width - 0.5) / (2 * hidden) if layer.width else None
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": not layer.heads,
            "replace_with_linear": False,
        },
        "ffn": {"ffn_mult": factor, "no_op": not layer.width, "replace_with_linear": False},
    }


def sizes_read(config: dict[str, Any]) -> list[Layer]:
    """The layers that a config stands for, as vLLM's and mlx-lm's nemotron_nas.py compute them."""
    most, hidden = config["num_attention_heads"], config["hidden_size"]
    found = []
    for block in config["block_configs"]:
        group, factor = block["attention"]["n_heads_in_group"], block["ffn"]["ffn_mult"]
        width = (
            0 if factor is None else -(-int(2 * round(factor, 6) * hidden / 3) // _ROUND) * _ROUND
        )
        found.append(Layer(most if group else 0, most // group if group else 0, width))
    return found
