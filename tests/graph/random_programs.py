"""Random programs, built directly as FX graphs: no tracing, so that many fit into a minute."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from prunec.graph.program import Program

aten = torch.ops.aten
BATCH, LENGTH = 2, 5
WIDTHS = (4, 6, 8, 9, 10, 12)
Step = tuple[str, int]


class Builder:
    """A program under construction: values are [batch, length, width]."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.by_shape: dict[tuple[int, ...], list[fx.Node]] = {}
        self.last_placeholder: fx.Node | None = None
        shape = (BATCH, LENGTH, 7)
        self.example = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.input = self._placeholder("x", shape)
        self.values = [self.input]

    def _placeholder(self, name: str, shape: Sequence[int]) -> fx.Node:
        where = self.last_placeholder
        with self.graph.inserting_before(
            where.next if where is not None else next(iter(self.graph.nodes), None)
        ):
            node = self.graph.placeholder(name)
        self.last_placeholder = node
        node.meta["val"] = torch.empty(*shape, dtype=torch.float64, device="meta")
        return node

    def parameter(self, *shape: int) -> fx.Node:
        name = f"w{len(self.state)}"
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.state[name] = noise * (shape[1] ** -0.5) if len(shape) > 1 else 1 + 0.5 * noise
        node = self._placeholder(name, shape)
        self.by_shape.setdefault(tuple(shape), []).append(node)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fetch: Callable[[fx.Node], Any] = lambda n: n.meta["val"]  # noqa: E731
        node.meta["val"] = target(*fx.map_arg(args, fetch), **fx.map_arg(kwargs, fetch))
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def shape(self, node: fx.Node) -> list[int]:
        return list(node.meta["val"].shape)

    def width(self, node: fx.Node) -> int:
        return self.shape(node)[-1]

    def linear(self, x: fx.Node, width: int, bias: bool = False, shared: bool = False) -> fx.Node:
        known = self.by_shape.get((width, self.width(x)), [])
        weight = known[0] if shared and known else self.parameter(width, self.width(x))
        return self.call(aten.linear.default, x, weight, self.parameter(width) if bias else None)

    def view(self, x: fx.Node, *sizes: int) -> fx.Node:
        return self.call(aten.reshape.default, x, list(sizes))

    def program(self) -> Program:
        """The last value, read out by a linear layer; values that nothing reads are added in."""
        out = [self.linear(v, 3) for v in self.values if not v.users or v is self.values[-1]]
        total = out[0]
        for other in out[1:]:
            total = self.call(aten.add.Tensor, total, other)
        self.graph.output((total,))
        self.graph.lint()
        module = fx.GraphModule({}, self.graph)
        return Program(
            graph_module=module,
            bindings={name: name for name in self.state},
            inputs={"x": "x"},
            state=self.state,
            parameters=frozenset(self.state),
            tied={},
            example={"x": self.example},
        )


def build(steps: Sequence[Step]) -> Program:
    """The program that these steps make, each a name and a number that settles its choices."""
    builder = Builder()
    builder.values.append(builder.linear(builder.input, 12, bias=True))
    for name, number in steps:
        STEPS[name](builder, random.Random(number))
    return builder.program()


def _pick(b: Builder, r: random.Random) -> fx.Node:
    return r.choice(b.values[1:][-3:])


def linear(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    b.values.append(b.linear(x, r.choice(WIDTHS), r.random() < 0.5, r.random() < 0.3))


def activation(b: Builder, r: random.Random) -> None:
    target = r.choice(
        [aten.relu.default, aten.cos.default, aten.sigmoid.default, aten.gelu.default]
    )
    b.values.append(b.call(target, _pick(b, r)))


def combine(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    others = [v for v in b.values[1:] if b.width(v) == b.width(x)]
    target = r.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor])
    b.values.append(b.call(target, x, r.choice(others)))


def residual(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    hidden = b.call(aten.tanh.default, b.linear(x, r.choice(WIDTHS)))
    b.values.append(b.call(aten.add.Tensor, x, b.linear(hidden, b.width(x))))


def norm(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    width = b.width(x)
    kind = r.choice(["layer", "rms", "soft", "group", "centre", "peak", "spread"])
    if kind == "layer":
        weight, bias = b.parameter(width), b.parameter(width)
        y = b.call(aten.layer_norm.default, x, [width], weight, bias)
    elif kind == "rms":
        square = b.call(aten.pow.Tensor_Scalar, x, 2)
        mean = b.call(aten.add.Tensor, b.call(aten.mean.dim, square, [-1], True), 1e-6)
        y = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, mean))
        y = b.call(aten.mul.Tensor, b.parameter(width), y)
    elif kind == "soft":
        y = b.call(aten.softmax.int, x, -1)
    elif kind == "group":
        groups = r.choice([g for g in (1, 2, 3) if width % g == 0])
        channels = b.call(aten.transpose.int, x, 1, 2)
        weight, bias = b.parameter(width), b.parameter(width)
        y = b.call(aten.group_norm.default, channels, groups, weight, bias)
        y = b.call(aten.transpose.int, y, 1, 2)
    elif kind == "centre":
        y = b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [-1], True))
    elif kind == "peak":
        y = b.call(aten.sub.Tensor, x, b.call(aten.amax.default, x, [-1], True))
    else:
        y = b.call(aten.mul.Tensor, x, b.call(aten.std.correction, x, [-1], keepdim=True))
    b.values.append(y)


def gate(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    width = r.choice(WIDTHS)
    both = b.linear(x, 2 * width, r.random() < 0.5)
    halves = b.call(aten.chunk.default, both, 2, -1)
    opened = b.call(aten.sigmoid.default, b.item(halves, 0))
    b.values.append(b.call(aten.mul.Tensor, opened, b.item(halves, 1)))


def split(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    width = b.width(x)
    cut = r.randint(1, width - 1)
    pieces = b.call(aten.split_with_sizes.default, x, [cut, width - cut], -1)
    parts = [b.item(pieces, 0), b.call(aten.tanh.default, b.item(pieces, 1))]
    r.shuffle(parts)
    b.values.append(b.call(aten.cat.default, parts, -1))


def concatenate(b: Builder, r: random.Random) -> None:
    parts = [_pick(b, r) for _ in range(2)]
    if sum(map(b.width, parts)) <= 24:
        b.values.append(b.call(aten.cat.default, parts, -1))


def rotate(b: Builder, r: random.Random) -> None:
    """Halves or neighbours in pairs, as rotary embeddings turn them."""
    x = _pick(b, r)
    half = b.width(x) // 2
    if b.width(x) % 2:
        return
    if r.random() < 0.5:
        first = b.call(aten.slice.Tensor, x, 2, 0, half)
        second = b.call(aten.slice.Tensor, x, 2, half, 2**63 - 1)
        turned = b.call(aten.cat.default, [b.call(aten.neg.default, second), first], -1)
    else:
        first = b.call(aten.slice.Tensor, x, 2, 0, 2**63 - 1, 2)
        second = b.call(aten.slice.Tensor, x, 2, 1, 2**63 - 1, 2)
        pair = b.call(aten.stack.default, [b.call(aten.neg.default, second), first], -1)
        turned = b.call(aten.flatten.using_ints, pair, -2)
    y = b.call(aten.mul.Tensor, x, b.parameter(1))
    b.values.append(b.call(aten.add.Tensor, y, b.call(aten.mul.Tensor, turned, b.parameter(1))))


def factors(b: Builder, r: random.Random) -> None:
    """Scale by row, by column or by both of a two-way view, perhaps transposed on the way."""
    x = _pick(b, r)
    width = b.width(x)
    outer = r.choice([k for k in range(2, width + 1) if width % k == 0])
    y = b.view(x, BATCH, LENGTH, outer, width // outer)
    shape = r.choice([(outer, 1), (width // outer,), (outer, width // outer)])
    scale = b.parameter(*shape)
    if r.random() < 0.3:
        scale = b.call(aten.expand.default, scale, [BATCH, LENGTH, outer, width // outer])
    y = b.call(aten.mul.Tensor, y, scale)
    if r.random() < 0.3:
        y = b.call(aten.permute.default, y, [0, 1, 3, 2])
    b.values.append(b.view(y, BATCH, LENGTH, width))


def attention(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    groups, rep, width, deep = r.choice([(3, 2, 4, 4), (2, 2, 3, 5), (3, 1, 2, 2), (1, 3, 4, 2)])
    heads = groups * rep
    fused = r.choice(["none", "segments", "blocks"]) if rep == 1 and width == deep else "none"
    if fused == "none":
        q, k, v = (b.linear(x, n) for n in (heads * width, groups * width, groups * deep))
        q = b.view(q, BATCH, LENGTH, heads, width)
        k = b.view(k, BATCH, LENGTH, groups, width)
        v = b.view(v, BATCH, LENGTH, groups, deep)
    elif fused == "segments":
        pieces = b.call(aten.chunk.default, b.linear(x, 3 * heads * width, True), 3, -1)
        q, k, v = (b.view(b.item(pieces, i), BATCH, LENGTH, heads, width) for i in range(3))
    else:
        y = b.view(b.linear(x, 3 * heads * width, True), BATCH, LENGTH, heads, 3 * width)
        pieces = b.call(aten.split.Tensor, y, width, -1)
        q, k, v = (b.item(pieces, i) for i in range(3))
    q, k, v = (b.call(aten.transpose.int, t, 1, 2) for t in (q, k, v))
    if r.random() < 0.4 and rep > 1:
        options = {"enable_gqa": True}
    else:
        k, v = _repeated(b, r, k, rep), _repeated(b, r, v, rep)
        options = {}
    if r.random() < 0.5:
        y = b.call(aten.scaled_dot_product_attention.default, q, k, v, **options)
    else:
        k, v = (t if b.shape(t)[1] == heads else _repeated(b, r, t, rep) for t in (k, v))
        scores = b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, 2, 3))
        y = b.call(aten.matmul.default, b.call(aten.softmax.int, scores, -1), v)
    y = b.view(b.call(aten.transpose.int, y, 1, 2), BATCH, LENGTH, heads * deep)
    b.values.append(b.linear(y, b.width(x)))


def _repeated(b: Builder, r: random.Random, x: fx.Node, times: int) -> fx.Node:
    batch, groups, length, width = b.shape(x)
    if times == 1:
        return x
    if r.random() < 0.5:
        return b.call(aten.repeat_interleave.self_int, x, times, 1)
    x = b.call(aten.unsqueeze.default, x, 2)
    x = b.call(aten.expand.default, x, [batch, groups, times, length, width])
    return b.view(x, batch, groups * times, length, width)


def convolution(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    width = b.width(x)
    channels = b.call(aten.transpose.int, x, 1, 2)
    groups = r.choice([1, width, r.choice([g for g in (1, 2, 3) if width % g == 0])])
    out = width if groups == width else r.choice([n for n in WIDTHS if n % groups == 0] or [width])
    weight = b.parameter(out, width // groups, 3)
    y = b.call(aten.conv1d.default, channels, weight, None, [1], [1], [1], groups)
    b.values.append(b.call(aten.transpose.int, y, 1, 2))


def experts(b: Builder, r: random.Random) -> None:
    """Two of five experts a position, by a one-hot mask or by gathering their weights."""
    x = _pick(b, r)
    width, out = b.width(x), r.choice(WIDTHS)
    scores = b.linear(x, 5)
    best = b.call(aten.topk.default, b.call(aten.softmax.int, scores, -1), 2, -1)
    weight, chosen = b.item(best, 0), b.item(best, 1)
    stack = b.parameter(5, width, out)
    if r.random() < 0.5:
        mask = b.call(aten.to.dtype, b.call(aten.one_hot.default, chosen, 5), torch.float64)
        mask = b.call(aten.mul.Tensor, mask, b.call(aten.unsqueeze.default, weight, -1))
        mask = b.call(aten.sum.dim_IntList, mask, [-2])
        y = b.call(aten.einsum.default, "bsi,eio->bseo", [x, stack])
        y = b.call(aten.mul.Tensor, y, b.call(aten.unsqueeze.default, mask, -1))
        b.values.append(b.call(aten.sum.dim_IntList, y, [-2]))
        return
    own = b.call(aten.index.Tensor, stack, [chosen])
    y = b.call(aten.einsum.default, "bsi,bskio->bsko", [x, own])
    y = b.call(aten.mul.Tensor, y, b.call(aten.unsqueeze.default, weight, -1))
    b.values.append(b.call(aten.sum.dim_IntList, y, [-2]))


def tile(b: Builder, r: random.Random) -> None:
    x = _pick(b, r)
    if b.width(x) <= 10:
        target = r.choice([aten.repeat.default, aten.tile.default])
        b.values.append(b.call(target, x, [1, 1, 2]))


def disorder(b: Builder, r: random.Random) -> None:
    """What no unit survives: an order that changes, a position that is picked."""
    x = _pick(b, r)
    kind = r.choice(["flip", "roll", "select", "cumsum", "triangle"])
    if kind == "flip":
        y = b.call(aten.flip.default, x, [-1])
    elif kind == "roll":
        y = b.call(aten.roll.default, x, [1], [-1])
    elif kind == "select":
        one = b.call(aten.select.int, x, -1, r.randrange(b.width(x)))
        y = b.call(aten.mul.Tensor, x, b.call(aten.unsqueeze.default, one, -1))
    elif kind == "cumsum":
        y = b.call(aten.cumsum.default, x, -1)
    else:
        y = b.call(aten.mul.Tensor, x, b.call(aten.tril.default, b.parameter(LENGTH, b.width(x))))
    b.values.append(y)


STEPS: dict[str, Callable[[Builder, random.Random], None]] = {
    step.__name__: step
    for step in (
        *(linear, activation, combine, residual, norm, gate, split, concatenate, rotate),
        *(factors, attention, convolution, experts, tile, disorder),
    )
}
