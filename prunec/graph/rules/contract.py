"""Contractions: linear, matmul, einsum, attention, grouped products."""

from __future__ import annotations

from torch import fx

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_product
from prunec.graph.rules.registry import RULES, Call, Dims, Resized, Result
from prunec.graph.selection import Selection

RULES.spec("aten::linear", "... i, o i, o -> ... o")
RULES.spec("aten::bilinear", "... i, ... j, o i j, o -> ... o")
RULES.spec("aten::outer", "i, j -> i j")
RULES.spec("aten::dot", "i, i -> ")
RULES.spec("aten::mv", "i j, j -> i")
RULES.spec("aten::cdist", "... p i, ... q i -> ... p q")


@RULES.register("aten::mm", "aten::bmm", "aten::matmul")
def matmul(call: Call) -> Result:
    left, right = (argument.name for argument in call.target._schema.arguments[:2])
    return _product(call, left, right, call.shape)


@RULES.register("aten::addmm", "aten::baddbmm", "aten::addbmm")
def matmul_plus(call: Call) -> Result:
    left, right = (argument.name for argument in call.target._schema.arguments[1:3])
    product = _product(call, left, right, call.shape)
    return call.broadcast([product, call.dims("self")], call.shape)


def _product(call: Call, left: str, right: str, shape: list[int]) -> Dims:
    """The matrix product of two operands, leading axes broadcast.

    Where both depend on the user's inputs this is attention of some sort: the contracted axis, the
    batched ones and the free axis of the right operand get the roles that kinds are told by.
    """
    a, b = call.dims(left), call.dims(right)
    inner = call.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    free_left = list(a[-2:-1])
    free_right = list(b[-1:]) if len(b) > 1 else []
    batch = call.broadcast([a[:-2], b[:-2]], shape[: len(shape) - len(free_left + free_right)])
    if _is_computed(call, call.arg(left)) and _is_computed(call, call.arg(right)):
        call.note(inner, "score")
        for dim in batch:
            call.note(dim, "head")
        for dim in free_right:
            call.note(dim, "value")
    return (*batch, *free_left, *free_right)


def _is_computed(call: Call, node: fx.Node) -> bool:
    """Whether a value is made from the user's inputs, not a stored weight looked up by them."""
    schema = getattr(node.target, "_schema", None)
    is_lookup = schema is not None and schema.name == "aten::index"
    return call.is_data(node) and not (is_lookup and not call.is_data(node.all_input_nodes[0]))


@RULES.register("aten::einsum")
def einsum(call: Call) -> Result:
    equation = str(call.arg("equation")).replace(" ", "")
    if "->" not in equation:
        raise DimError("an einsum without an explicit result")
    left, result = equation.split("->")
    letters: dict[str, Dim] = {}
    leading: list[Dims] = []
    for term, node in zip(left.split(","), call.arg("tensors"), strict=True):
        dims = call.dims(node)
        before, dots, after = term.partition("...")
        middle = len(dims) - len(before) - len(after)
        if dots:
            leading.append(dims[len(before) : len(before) + middle])
        named = (*dims[: len(before)], *dims[len(before) + middle :])
        for letter, dim in zip(before + after, named, strict=True):
            known = letters.get(letter)
            if known is None or known.size == 1:
                letters[letter] = dim
            elif dim.size != 1:
                letters[letter] = call.unify(known, dim)
    _einsum_roles(call, left.split(","), result, letters)
    before, _, after = result.partition("...")
    shape = call.shape[len(before) : len(call.shape) - len(after)]
    front = call.broadcast(leading, shape) if leading else ()
    return (*(letters[c] for c in before), *front, *(letters[c] for c in after))


def _einsum_roles(call: Call, terms: list[str], result: str, letters: dict[str, Dim]) -> None:
    """Roles as in `_product`, of the two operands that depend on the user's inputs."""
    nodes = call.arg("tensors")
    data = [term for term, node in zip(terms, nodes, strict=True) if _is_computed(call, node)]
    if len(data) != 2:
        return
    result += "".join(term for term in terms if term not in data)
    for letter, dim in letters.items():
        if all(letter in term for term in data):
            call.note(dim, "head" if letter in result else "score")
        elif letter in data[1] and letter in result:
            call.note(dim, "value")


@RULES.register("aten::scaled_dot_product_attention")
def attention(call: Call) -> Result:
    query, key, value = (list(call.dims(name)) for name in ("query", "key", "value"))
    call.note(call.unify(query[-1], key[-1]), "score")
    call.unify(key[-2], value[-2])
    key_batch, value_batch = key[:-2], value[:-2]
    if len(query) > 2 and key_batch[-1].size != query[-3].size:
        group, shared = as_product(
            query[-3], [key_batch[-1].size, query[-3].size // key_batch[-1].size]
        )
        call.unify(group, key_batch[-1])
        call.unify(key_batch[-1], value_batch[-1])
        call.note(shared, "shared")
        key_batch[-1] = value_batch[-1] = query[-3]
    batch = call.broadcast([query[:-2], key_batch, value_batch], call.shape[:-2])
    for dim in batch:
        call.note(dim, "head")
    call.note(value[-1], "value")
    call.note(key[-2], "normalised")
    if isinstance(call.arg("attn_mask"), fx.Node):
        scores = (*batch, query[-2], key[-2])
        call.broadcast([scores, call.dims("attn_mask")], [dim.size for dim in scores])
    return (*batch, query[-2], value[-1])


@RULES.resizes("aten::scaled_dot_product_attention")
def resize_attention(call: Call, selection: Selection) -> Resized:
    """The default scale follows head_dim; pruned, it must stay what it was."""
    contracted = call.dims("query")[-1]
    if call.arg("scale") is None and selection.touches(contracted):
        return Resized({"scale": contracted.size**-0.5})
    return Resized()


@RULES.register("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(call: Call) -> Result:
    """Rows of the input go to one of the stacked matrices each: [tokens, i] x [experts, i, o]."""
    names = [a.name for a in call.target._schema.arguments[:2]]
    rows, stack = call.dims(names[0]), call.dims(names[1])
    call.unify(rows[1], stack[1])
    for dim in (stack[1], stack[2]):
        call.note(dim, "aligned")  # the fused kernel refuses strides that are no whole 16 bytes
    if isinstance(call.arg("offs"), fx.Node):
        call.unify(stack[0], call.dims("offs")[0])
    return (rows[0], stack[2])
