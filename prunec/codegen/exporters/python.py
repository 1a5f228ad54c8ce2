"""A readable Python module that needs torch alone, with its weights in safetensors."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, fx, nn

from prunec.codegen.exporters.compare import Engine, measure
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.pt2 import untraceable
from prunec.codegen.exporters.python_graph import readable
from prunec.codegen.exporters.python_module import Class, Writer
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import Traced, named_forward
from prunec.codegen.fields import overrides
from prunec.errors import ExportError

_ENGINE = Engine("python", "torch", hidden=("prunec", "transformers"))
_WEIGHTS = "model.safetensors"
_HEAD = '''\
"""{title}

Written by prunec from the traced graph of the pruned model. It needs torch alone:

    from model import load

    model = load()
    logits = model({call})

{sizes}
"""

import json
import math
import mmap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
'''
_LOADER = '''\
# Other names of a tensor -> the name it has in the file.
TIED = {tied}
TYPES = {{
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}}


def read_safetensors(path):
    """Tensors by name. The file: 8 bytes with the length of a JSON header, that, then the data."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {{}}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            shape, kind = entry["shape"], TYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=kind)
                continue
            count = (end - begin) // kind.itemsize
            flat = torch.frombuffer(data, dtype=kind, count=count, offset=start + begin)
            tensors[name] = flat.reshape(shape).clone()
    return tensors


def load(path=Path(__file__).with_name("{weights}")):
    """The model with its weights, in eval mode."""
    with torch.device("meta"):
        model = {root}()
    tensors = read_safetensors(path)
    tensors |= {{name: tensors[first] for name, first in TIED.items()}}
    model.load_state_dict(tensors, assign=True)
    for name, first in TIED.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    return model.eval()
'''


@dataclass(frozen=True)
class Python:
    """``model.py``, structured as the model's modules are, and ``model.safetensors``."""

    file: ClassVar[str] = "model.py"
    alone: ClassVar[bool] = False

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        reasons = untraceable(source)
        if not reasons:
            try:
                source.once(_written)
            except LookupError as error:
                return [f"no Python is known for the call {error}"]
        return reasons

    def needed_bytes(self, source: ModelDirectory) -> int:
        return source.weight_bytes

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        text, tensors = source.once(_written)
        (folder / self.file).write_text(text, encoding="utf-8")
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        return source.traced.fixed

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """In a fresh process that can import neither prunec nor transformers."""
        return measure(_ENGINE, source, folder / self.file)


def _written(source: ModelDirectory) -> tuple[str, dict[str, Tensor]]:
    """The text of the module and the tensors that it loads."""
    traced = source.traced
    tree, variables = readable(traced.program)
    model = named_forward(source.model, list(traced.example))
    writer = Writer(tree, model, variables, _layer_fields(source))
    root = writer.write()
    tensors, tied = _state(tree)
    head = _HEAD.format(title=_title(source), call=_call(traced), sizes=_sizes(source, traced))
    names = "".join(f'    "{name}": "{first}",\n' for name, first in tied.items())
    loader = _LOADER.format(
        tied=f"{{\n{names}}}" if tied else "{}", weights=_WEIGHTS, root=root.name
    )
    text = "\n\n".join([head, *(f"{made.text}\n" for made in writer.classes), loader])
    return _with_imports(text, writer.classes), tensors


def _with_imports(text: str, classes: Sequence[Class]) -> str:
    """Without the import of what no class uses."""
    bodies = "".join(made.text for made in classes)
    for line, sign in (("import math\n", "math."), ("import torch.nn.functional as F\n", "F.")):
        if sign not in bodies:
            text = text.replace(line, "", 1)
    return text


def _title(source: ModelDirectory) -> str:
    return f"{type(source.model).__name__.removeprefix('Prunec')}, pruned."


def _call(traced: Traced) -> str:
    return ", ".join(traced.program.graph_signature.user_inputs)


def _sizes(source: ModelDirectory, traced: Traced) -> str:
    count = sum(parameter.numel() for parameter in source.model.parameters())
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in traced.example.items())
    free = " and ".join(traced.dynamic)
    said = f"Any {free} goes" if free else "No other size goes"
    text = f"{count:,} parameters. {said}; it was traced with {shapes}."
    return textwrap.fill(text, width=100)


def _layer_fields(source: ModelDirectory) -> dict[str, list[int]]:
    """Config field -> its value in every layer, of the fields that differ."""
    config: Any = getattr(source.model, "config", None)
    rows = overrides(config)
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {n: [rows.get(i, {}).get(n, getattr(config, n)) for i in range(count)] for n in names}


def _state(tree: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor that the code reads, once; and other names of the same one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for path, module in tree.named_modules():
        graph = getattr(module, "graph", None)
        nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
        for target in dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr"):
            name, tensor = (f"{path}.{target}" if path else target), _tensor(module, target)
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
            if first.setdefault(key, name) == name:
                tensors[name] = tensor.detach().contiguous()
            else:
                tied[name] = first[key]
    return tensors, tied


def _tensor(module: nn.Module, target: str) -> Tensor:
    if "." in target or not isinstance(found := getattr(module, target), Tensor):
        raise ExportError(f"the traced graph reads {target}, which is no tensor of its module")
    return found
