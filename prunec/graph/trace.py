"""From an nn.Module to a Program, by torch.export."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from prunec.errors import TraceError
from prunec.graph.forwards import traceable
from prunec.graph.inline import inline
from prunec.graph.program import Program

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""``loss(model, inputs)``: a scalar to differentiate; it calls the model itself."""


class _Positional(nn.Module):
    """The model as a function of positional tensors that returns tensors only.

    A cache would make the graph depend on hidden state, so it is switched off where the model's
    forward knows the word.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model = model
        self.names = tuple(names)
        accepted = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=True))
        return result_tensors(self.model(**named, **self.options))


class _Scalar(nn.Module):
    """A loss of the model as a function of positional tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str], loss: Loss):
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.loss = loss

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        return (self.loss(self.model, dict(zip(self.names, tensors, strict=True))),)


def result_tensors(output: Any) -> tuple[Tensor, ...]:
    """The result proper: logits where the output names them, else every float tensor in it."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if isinstance(logits, Tensor):
        return (logits,)
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    return tuple(leaf for leaf in leaves if leaf.is_floating_point()) or tuple(leaves)


def of_containers(output: Any) -> bool:
    """Whether an output is tensors in tuples, lists and dicts alone, without a class of its own."""
    if type(output) in (tuple, list):
        return all(map(of_containers, output))
    if type(output) is dict:
        return all(map(of_containers, output.values()))
    return isinstance(output, Tensor)


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def trace(model: nn.Module, example: Example) -> Program:
    """Trace ``model`` into a flat graph that holds for inputs of the example's shapes.

    Parameters may lie on the meta device (buffers must be real): the graph is the same and no
    memory is used. The model is not changed.

    Args:
        model: any nn.Module; traced in eval mode, without gradients and without a cache.
        example: inputs by name, or positional: a tensor or a sequence of tensors.

    Raises:
        TraceError: if the model cannot be exported, with torch's reason, or makes nothing of an
            input that its forward does not name.
    """
    model = unwrapped(model)
    inputs = name_inputs(model, example)
    with torch.no_grad():
        exported = _export(model, _Positional(model, list(inputs)), inputs)
    program = _program(model, exported, inputs)
    _check_read(model, program)
    return program


def trace_loss(model: nn.Module, loss: Loss, example: Mapping[str, Tensor]) -> Program:
    """Trace a loss of ``model`` into a program whose one output is the scalar ``loss`` returns.

    Args:
        example: inputs by name, what ``loss`` reads besides the model's own among them.

    Raises:
        TraceError: the loss cannot be exported, or is no floating-point scalar.
    """
    with torch.enable_grad():  # so that the graph tells what the model computes without
        exported = _export(model, _Scalar(model, list(example), loss), example, loss=True)
    program = _program(model, exported, example)
    (output,) = program.graph.find_nodes(op="output")
    result = output.args[0][0] if output.args[0] else None
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise TraceError(
            f"the loss of {type(model).__name__} is no floating-point scalar",
            fix="return one number per call, such as a mean over tokens",
        )
    return program


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DataParallel: they add nothing to what it computes.

    Raises:
        TraceError: it is no nn.Module, or parts of it lie on disk.
    """
    _check_module(model)
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"the model is a {type(model).__name__}, not an nn.Module",
            fix="give the module itself; prunec.models.open_model opens one by name",
        )
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise TraceError(
            "parts of the model lie on disk, by its device_map",
            where=type(model).__name__,
            fix="prunec.models.open_model(PATH, out_of_core=True) reads weights from their files",
        )


def name_inputs(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Example inputs by the names of the model's forward arguments.

    Raises:
        TraceError: they are no tensors, or more than forward takes.
    """
    given = example.values() if isinstance(example, Mapping) else example
    tensors = [given] if isinstance(given, Tensor) else list(given or ())
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors) or type(example).__name__
        raise TraceError(
            f"the example inputs are no tensors: {kinds}",
            where=type(model).__name__,
            fix="give a tensor, a tuple of tensors, or a dict of them by the names of forward's "
            "arguments; a forward that takes nested inputs needs a module around it that takes "
            "tensors",
        )
    if isinstance(example, Mapping):
        return dict(example)
    accepted = list(inspect.signature(model.forward).parameters)
    if len(tensors) > len(accepted):
        raise TraceError(
            f"{len(tensors)} example inputs for a forward of {len(accepted)} arguments",
            where=type(model).__name__,
            fix=f"give at most {len(accepted)}, or a dict by name ({', '.join(accepted)})",
        )
    return dict(zip(accepted, tensors, strict=False))


def _check_read(model: nn.Module, program: Program) -> None:
    """Raises TraceError for an input that goes into ``**kwargs`` and from there nowhere.

    Most often its name is misspelt, and the model then runs as if it were absent.
    """
    accepted = inspect.signature(model.forward).parameters
    for node in program.graph.find_nodes(op="placeholder"):
        name = program.inputs.get(node.name)
        if name is not None and name not in accepted and not node.users:
            raise TraceError(
                f"{type(model).__name__} makes nothing of the input {name}",
                so=f"its forward takes {', '.join(accepted)}",
                fix="leave it out, or correct its name",
            )


def _export(
    model: nn.Module, wrapper: nn.Module, inputs: Mapping[str, Tensor], *, loss: bool = False
) -> ExportedProgram:
    held = next((p.device for p in model.parameters() if not p.is_meta), None)
    arguments = tuple(value.to(held) for value in inputs.values())
    try:
        with in_eval(wrapper), traceable(model), _real_looking_parameters(wrapper) as mode:
            if mode is not None:
                arguments = tuple(mode.from_tensor(value) for value in arguments)
            with _hushed():
                return _without_vmap(torch.export.export(wrapper, arguments, strict=False))
    except Exception as error:  # export runs the model's own code, which may raise anything
        name = type(model).__name__
        what = f"the loss of {name}" if loss else name
        raise TraceError(
            f"{what} cannot be traced: {_reason(error)}",
            where=_model_line(error),
            fix=_LOSS_FIX.format(", ".join(inputs)) if loss else _FORWARD_FIX,
        ) from error


_FORWARD_FIX = (
    "export needs a forward without data-dependent Python control flow; check the "
    "example inputs, or name another forward to trace (docs/rules.md, Forwards)"
)
_LOSS_FIX = "loss(model, inputs) calls the model and computes with torch; inputs hold {}"


def _reason(error: Exception) -> str:
    """The first line of an error; of one that says a name alone, with its kind."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if isinstance(error, KeyError) else lines[0]


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; each of its parts afterwards in the mode that it was in."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@contextmanager
def _hushed() -> Iterator[None]:
    """Without torch's own account of an export: what matters of it is in the error."""
    before, internals = logging.root.manager.disable, vars(import_module("torch.export._trace"))
    logging.disable(logging.ERROR)
    internals["print"] = lambda *_, **__: None  # of the graph so far, twice, where export fails
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
        del internals["print"]


def _without_vmap(exported: ExportedProgram) -> ExportedProgram:
    """Calls of torch.vmap stand in the graph as marks around what they map: said by operators."""
    names = {getattr(node.target, "__name__", "") for node in exported.graph.nodes}
    if "_add_batch_dim" not in names:
        return exported
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's of itself
        said: ExportedProgram = exported.run_decompositions({})
    return said


@contextmanager
def _real_looking_parameters(module: nn.Module) -> Iterator[FakeTensorMode | None]:
    """Stand fake CPU tensors in for meta parameters while tracing, so that devices agree."""
    slots = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    if not slots:
        yield None
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cpu = torch.device("cpu")
    fakes: dict[int, nn.Parameter] = {}
    for owner, name, parameter in slots:
        if id(parameter) not in fakes:
            fake = mode.fake_tensor_converter.from_meta_and_device(mode, parameter.data, cpu)
            fakes[id(parameter)] = nn.Parameter(fake, requires_grad=False)
        owner._parameters[name] = fakes[id(parameter)]
    try:
        yield mode
    finally:
        for owner, name, parameter in slots:
            owner._parameters[name] = parameter


def _model_line(error: BaseException) -> str | None:
    """The innermost frame of the traceback that is neither ours nor torch's."""
    where = None
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/prunec/" not in file and not file.startswith("<"):
            where = f"{file.rsplit('/', 1)[-1]}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where


def _program(model: nn.Module, exported: ExportedProgram, inputs: Mapping[str, Tensor]) -> Program:
    graph_module = exported.graph_module
    signature = exported.graph_signature
    owned = _owned_tensors(model)
    canonical = _canonical_names(owned)
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    constants = {
        name: value for name, value in exported.constants.items() if isinstance(value, Tensor)
    }
    bindings: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for placeholder, source in sources.items():
        name = source.removeprefix("model.")
        name = canonical.get(name, name)
        bindings[placeholder] = name
        state[name] = owned[name] if name in owned else constants[source]
    parameters = {canonical[name] for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {canonical[name] for name, _ in model.named_buffers(remove_duplicate=False)}
    _return_only(graph_module.graph, set(signature.user_outputs))
    inline(graph_module)
    _clean(graph_module.graph)
    graph_module.recompile()
    return Program(
        graph_module=graph_module,
        bindings=bindings,
        inputs=dict(zip(signature.user_inputs, inputs, strict=True)),
        state=state,
        parameters=frozenset(parameters & set(state)),
        tied={name: first for name, first in canonical.items() if name != first},
        example=inputs,
        buffers=frozenset((buffers - parameters) & set(state)),
        vacant=frozenset(
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is None
        ),
    )


def _owned_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _canonical_names(owned: Mapping[str, Tensor]) -> dict[str, str]:
    """Every tensor name -> the first name of the same storage and view: tied weights are one."""
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for name, tensor in owned.items():
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        names[name] = first.setdefault(key, name)
    return names


_CHECKS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")


def _return_only(graph: fx.Graph, names: set[str]) -> None:
    """Drop the outputs that export adds, such as mutated buffers."""
    output = graph.output_node()
    results = [node for node in pytree.tree_leaves(output.args) if isinstance(node, fx.Node)]
    output.args = (tuple(node for node in results if node.name in names),)


def _clean(graph: fx.Graph) -> None:
    """Drop export's own checks and what no output depends on; say modules in the model's names."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith(_CHECKS) and not node.users:
            graph.erase_node(node)
            continue
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(path) for path, _ in stack.values()]
        node.meta["module"] = paths[-1].removeprefix("model").removeprefix(".") if paths else ""
    # Attention is tagged as random, for its dropout: by default one of an unused layer would stay.
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    graph.lint()
