"""GGUF for llama.cpp: arch ``deci``, the LLaMA graph with sizes of its own in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunec.codegen.battery import difference
from prunec.codegen.exporters.compare import absent, named, outputs
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.gguf_tokenizer import read_tokenizer
from prunec.codegen.exporters.llama_graph import LlamaGraph, llama_graph
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.stranger import greedy
from prunec.codegen.exporters.traced import Inputs
from prunec.errors import ExportError, VerifyError
from prunec.staging import temporary

_ARCH = "deci"
_REMOVED_WIDTH = 32  # llama.cpp skips the rest of a layer with n_ff = 0, attention's output too
_PROMPT, _TEXT, _TOKENS = 8, 50, 512
_LIMIT = 1e-3  # of the largest logit
# By the type that weights are stored in: how far off they may be, of the largest in their row; and
# below what numbers of 16 bits, as the scale of a q8_0 block is one, are coarser.
_ROUNDING = {"f32": (0.0, 0.0), "f16": (2**-11, 2**-14), "q8_0": (1 / 127, 2**-9)}
_BLOCK = 32  # weights of one q8_0 block
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Gguf:
    """One file with weights, sizes and tokenizer. `type`: f32, f16 or q8_0."""

    type: str = "f32"

    file: ClassVar[str] = "model.gguf"
    alone: ClassVar[bool] = True

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        if self.type not in _ROUNDING:
            raise ExportError(f"no GGUF type {self.type!r}", fix=f"one of {', '.join(_ROUNDING)}")
        if find_spec("gguf") is None:
            raise ExportError("GGUF export needs gguf", fix='pip install "prunec[gguf]"')
        try:
            graph = source.once(llama_graph)
        except ExportError as error:
            return [error.where or error.message]
        _, reason = read_tokenizer(source.path, graph.vocabulary)
        return [reason] if reason else []

    def needed_bytes(self, source: ModelDirectory) -> int:
        """Of another type than f32 also what is compared: the same in f32."""
        types = {self.type} if find_spec("llama_cpp") is None else {self.type, "f32"}
        files = [(Gguf(name), tensors(source.once(llama_graph))) for name in types]
        return sum(file._bytes(tensor) for file, inside in files for _, tensor in inside)

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        import gguf

        graph = source.once(llama_graph)
        writer = gguf.GGUFWriter(folder / self.file, _ARCH)
        _write_sizes(writer, graph, source.path.name)
        tokenizer, _ = read_tokenizer(source.path, graph.vocabulary)
        notes = [] if tokenizer else ["the directory has no tokenizer, so the file has none"]
        if tokenizer:
            tokenizer.write(writer)
        else:
            writer.add_tokenizer_model("none")
        kept = self._write_tensors(writer, graph)
        if kept:
            notes.append(f"{kept} weights stay f32: their rows are no whole blocks of {_BLOCK}")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return notes

    def _write_tensors(self, writer: Any, graph: LlamaGraph) -> int:
        """Returns how many matrices could not have the wanted type."""
        import gguf

        kept = 0
        for name, tensor in tensors(graph):
            data, stored = tensor.float().contiguous().numpy(), self._stored(tensor)
            kept += tensor.ndim > 1 and stored != self.type
            dtype = gguf.GGMLQuantizationType[stored.upper()]
            writer.add_tensor(name, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
        return kept

    def _stored(self, tensor: Tensor) -> str:
        """The type that a tensor is stored in."""
        whole = self.type != "q8_0" or tensor.shape[-1] % _BLOCK == 0
        return self.type if tensor.ndim > 1 and whole else "f32"

    def _bytes(self, tensor: Tensor) -> int:
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self._stored(tensor).upper()]]
        return tensor.numel() // int(block) * int(size)

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """Logits of a long sequence; and greedy text through the KV cache, in float32.

        What fewer bits change adds up over the layers, to more than a wrong file may be off by. So
        for other types a file of the same in f32 is compared, and every weight with its original.
        """
        missing = absent(
            "llama.cpp", "llama-cpp-python", "llama_cpp", "pip install llama-cpp-python"
        )
        if missing is not None:
            return missing
        if self.type == "f32":
            return Finding(_engine(), "measured", _compared(source, folder / self.file))
        with temporary(folder) as beside:
            Gguf().write(source, beside)
            exact = _compared(source, beside / self.file)
        graph = source.once(llama_graph)
        limit, least = _ROUNDING[self.type]
        off = rounding(folder / self.file, graph, least)
        if not off <= limit:
            raise _not_the_model(f"weights are off by {off:.1e} of the largest in their row")
        cases = _cases(graph)
        found = outputs("llama_cpp", folder / self.file, cases)["long"]
        agreed = agreement(found, graph.logits(cases["long"]["input_ids"]))
        if not found.isfinite().all():
            raise _not_the_model("logits are NaN or Inf")
        said = f"in {self.type} weights within {off:.1e} of the largest in their row, argmax equal"
        return Finding(_engine(), "measured", f"in f32 {exact}; {said} at {agreed:.1%}")


def _compared(source: ModelDirectory, file: Path) -> str:
    """How an f32 file does in llama.cpp.

    Raises:
        VerifyError: not as the model.
    """
    graph = source.once(llama_graph)
    cases = _cases(graph)
    ids, prompt = cases["long"]["input_ids"], cases["prompt"]["input_ids"]
    count = min(_TEXT, graph.context - _PROMPT)
    found = outputs("llama_cpp", file, cases, greedy=count)
    wanted = graph.logits(ids)
    gap, agreed = difference([found["long"]], [wanted]), agreement(found["long"], wanted)
    text = greedy(lambda inputs: graph.logits(inputs["input_ids"]), prompt, count)
    same = int((found["greedy"] == text).long().cumprod(-1).sum())
    detail = (
        f"{ids.shape[1]} tokens: argmax equal at {agreed:.1%}, logits within {gap:.1e} of the "
        f"largest; greedy text with an f32 cache: {same} of {count} tokens the same"
    )
    if not (gap <= _LIMIT and agreed == 1 and same == count):
        raise _not_the_model(detail)
    return detail


def _cases(graph: LlamaGraph) -> dict[str, Inputs]:
    """Random tokens, and those that a text begins with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.vocabulary, (1, min(_TOKENS, graph.context)), generator=generator)
    return {"long": {"input_ids": ids}, "prompt": {"input_ids": ids[:, :_PROMPT]}}


def _engine() -> str:
    return named("llama-cpp-python")


def _not_the_model(detail: str) -> VerifyError:
    return VerifyError(
        f"{Gguf.file} is not the model", where=f"{_engine()}, {detail}", so="nothing was delivered"
    )


def rounding(file: Path, graph: LlamaGraph, least: float) -> float:
    """By how much a file's weights are off, of the largest in their row or of `least`.

    Inf where one is missing or too many, has another shape, or is stored in f32 and not the same.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst = 0.0
    for name, tensor in tensors(graph):
        if name not in stored:
            return float("inf")
        part = stored.pop(name)
        found = torch.tensor(gguf.quants.dequantize(part.data, part.tensor_type))
        wanted = tensor.float()
        if found.shape != wanted.shape:
            return float("inf")
        off = (found - wanted).abs().amax(-1)
        if part.tensor_type == gguf.GGMLQuantizationType.F32:
            worst = worst if not off.any() else float("inf")
        else:
            worst = max(worst, float((off / wanted.abs().amax(-1).clamp_min(least)).max()))
    return float("inf") if stored else worst


def agreement(found: Tensor, wanted: Tensor) -> float:
    """The share of positions with the same likeliest token, where it is not a tie within 1e-4."""
    best = wanted.topk(2, -1).values
    tied = best[..., 0] - best[..., 1] <= 1e-4 * wanted.abs().max()
    return float((tied | (found.argmax(-1) == wanted.argmax(-1))).float().mean())


def _write_sizes(writer: Any, graph: LlamaGraph, name: str) -> None:
    layers = graph.layers
    writer.add_name(name)
    writer.add_block_count(len(layers))
    writer.add_context_length(graph.context)
    writer.add_embedding_length(graph.hidden)
    writer.add_vocab_size(graph.vocabulary)
    # without heads in the first layer llama.cpp takes the head size of all layers for 0
    first = (max(1, layers[0].heads), max(1, layers[0].kv_heads))
    writer.add_head_count([first[0], *(layer.heads for layer in layers[1:])])
    writer.add_head_count_kv([first[1], *(layer.kv_heads for layer in layers[1:])])
    writer.add_feed_forward_length([layer.width or _REMOVED_WIDTH for layer in layers])
    writer.add_key_length(graph.head_dim)
    writer.add_value_length(graph.head_dim)
    writer.add_rope_dimension_count(graph.head_dim)
    writer.add_rope_freq_base(graph.theta)
    writer.add_layer_norm_rms_eps(graph.epsilon)


def tensors(graph: LlamaGraph) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its GGUF name.

    llama.cpp rotates neighbouring features of q and k, transformers the two halves: rows change
    places. A removed MLP is one of zeros, and so is the first attention.
    """
    yield "token_embd.weight", graph.tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", graph.tensors["model.norm.weight"]
    if not graph.tied:
        yield "output.weight", graph.head
    plain = graph.theta ** -(torch.arange(0, graph.head_dim, 2) / graph.head_dim)
    factors = plain / graph.frequencies.float()
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        yield "rope_freqs.weight", factors
    for index, layer in enumerate(graph.layers):
        for path, name in _NAMES.items():
            for kind in ("weight", "bias"):
                tensor = graph.weight(index, path, kind)
                if tensor is not None:
                    rotary = path in ("self_attn.q_proj", "self_attn.k_proj")
                    tensor = interleaved(tensor, graph.head_dim) if rotary else tensor
                    yield f"blk.{index}.{name}.{kind}", tensor
        if not layer.width:
            yield from _zeros(graph, index, "mlp", _REMOVED_WIDTH)
        if not (index or layer.heads):
            yield from _zeros(graph, index, "self_attn", graph.head_dim)


def _zeros(graph: LlamaGraph, index: int, part: str, width: int) -> Iterator[tuple[str, Tensor]]:
    """A part of a layer that adds nothing, in place of one that was removed."""
    wide, block = torch.zeros(width, graph.hidden), f"blk.{index}"
    *inward, outward = (name for path, name in _NAMES.items() if path.startswith(part))
    yield from ((f"{block}.{name}.weight", wide) for name in inward)
    yield f"{block}.{outward}.weight", wide.T
    norm = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}[part]
    if graph.weight(index, norm) is None:
        yield f"{block}.{_NAMES[norm]}.weight", torch.ones(graph.hidden)


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows (heads, half, pair) -> (heads, pair, half)."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
