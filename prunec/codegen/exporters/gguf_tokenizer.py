"""A transformers tokenizer in the terms of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How the text is split before byte-pair merges -> llama.cpp's name for it (src/llama-vocab.cpp)
_SPLITS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokens by id; `pre` names the way of splitting, None for a SentencePiece vocabulary."""

    directory: Path
    tokens: tuple[bytes, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    pre: str | None

    def write(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        import gguf

        writer.add_tokenizer_model("llama" if self.pre is None else "gpt2")
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        special = gguf.SpecialVocab(
            self.directory, load_merges=self.pre is not None, n_vocab=len(self.tokens)
        )
        special.add_to_gguf(writer, quiet=True)


def read_tokenizer(directory: Path, size: int) -> tuple[GgufTokenizer | None, str | None]:
    """The tokenizer of a directory for a vocabulary of `size`, or why llama.cpp cannot have it.

    Both are None where the directory has no tokenizer.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None, None
    data = json.loads(path.read_text(encoding="utf-8"))
    model = data["model"]
    if model["type"] != "BPE":
        return None, f"its tokenizer is {model['type']}, llama.cpp's is BPE"
    if len(model["vocab"]) > size:
        return None, f"its tokenizer has {len(model['vocab'])} tokens, its embedding {size}"
    if model.get("byte_fallback"):
        return _sentencepiece(directory, size), None
    split = tuple(_splits(data.get("pre_tokenizer") or {}))
    if data.get("normalizer") is not None or split not in _SPLITS:
        return None, "llama.cpp has no known name for the way its tokenizer splits text"
    return _byte_pairs(directory, data, size, _SPLITS[split]), None


def _splits(pre: Mapping[str, Any]) -> list[str]:
    if pre.get("type") == "Sequence":
        return [name for part in pre["pretokenizers"] for name in _splits(part)]
    if pre.get("type") == "Split":
        return [pre["pattern"].get("Regex", "")]
    if pre.get("type") == "ByteLevel":
        return ["ByteLevel" if pre.get("use_regex", True) else "bytes"]
    return ["Digits"] if pre.get("individual_digits") else [str(pre.get("type"))]


def _byte_pairs(directory: Path, data: Mapping[str, Any], size: int, pre: str) -> GgufTokenizer:
    import gguf

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in data["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in data.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        if added["id"] < size:
            tokens[added["id"]], types[added["id"]] = added["content"], kind
    encoded = tuple(token.encode() for token in tokens)
    return GgufTokenizer(directory, encoded, tuple(map(int, types)), None, pre)


def _sentencepiece(directory: Path, size: int) -> GgufTokenizer:
    import gguf

    known = list(gguf.LlamaHfVocab(directory).all_tokens())
    known += [(f"[PAD{i}]".encode(), -1e4, gguf.TokenType.UNUSED) for i in range(len(known), size)]
    tokens, scores, types = zip(*known, strict=True)
    return GgufTokenizer(directory, tokens, tuple(map(int, types)), tuple(map(float, scores)), None)
