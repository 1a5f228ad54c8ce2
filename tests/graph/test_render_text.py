"""The analysis in words."""

from __future__ import annotations

import re

from expecttest import assert_expected_inline
from pictured import three_layers

from prunec.graph.coupling import Pinned
from prunec.graph.render import describe
from prunec.graph.render.figures import fold_pinned, pattern


def test_the_analysis_reads_as_a_page() -> None:
    assert_expected_inline(
        describe(three_layers()),
        """\
3,360 parameters, 13 groups, pinned axes: 2; FLOPs are of one pass over tokens [2, 5]

Across blocks, or outside any
  group                      times  units  parameters a unit  FLOPs a unit  sits in
  hidden                         1     12                271         4,720  embed.weight[1]
    couples 3 blocks                                                        layers.*.norm1.weight[0]
    removing is not zeroing                                                 layers.*.norm1.bias[0]
                                                                            layers.*.attention.qkv.weight[1]
                                                                            layers.*.attention.out.weight[0]
                                                                            layers.*.norm2.weight[0]
                                                                            layers.*.norm2.bias[0]
                                                                            layers.*.mlp.gate.weight[1]
                                                                            layers.*.mlp.up.weight[1]
                                                                            layers.*.mlp.down.weight[0]
                                                                            and 1 more

layers.* (3 blocks)
  group                          times   units  parameters a unit  FLOPs a unit  sits in
  layers.*.attention/head            3       3                204         4,640  qkv.weight[0]
                                                                                 qkv.bias[0]
                                                                                 out.weight[1]
  layers.*.attention.qkv/qk_dim      3       4                 78         1,740  weight[0]
    chosen within every head                                                     bias[0]
  layers.*.attention/value_dim       3       4                 75         1,740  qkv.weight[0]
    chosen within every head                                                     qkv.bias[0]
                                                                                 out.weight[1]
  layers.*.mlp/ffn_channel           3  7 to 9                 36           720  gate.weight[0]
                                                                                 up.weight[0]
                                                                                 down.weight[1]

Depth: layers.* (3 blocks)
  branch              times  parameters             FLOPs  leaves out
  layers.*/attention      3         636            13.9 k  layers.*.norm1
                                                           layers.*.attention
  layers.*/mlp            3  276 to 348    5,040 to 6,480  layers.*.norm2
                                                           layers.*.mlp
  layers.*/block          3  912 to 984  19.0 k to 20.4 k  layers.*.norm1
                                                           layers.*.attention
                                                           layers.*.norm2
                                                           layers.*.mlp
""",
    )


def test_why_adds_what_is_pinned_with_its_reason() -> None:
    _, pinned = describe(three_layers(), why=True).split("Pinned axes: 2\n")
    assert re.search(r"addressed by position +1 +23 .*\.py:\d+ .*embed\.weight\[0\]", pinned)
    assert re.search(r"an axis of the output +1 +23 +head\.weight\[0\]", pinned)


def test_thousands_of_equal_pins_are_one_row() -> None:
    pinned = [
        Pinned(f"layers.{i}.conv.weight", axis, 3 + i % 2, "a kernel position", where(i))
        for i in range(1000)
        for axis in (2, 3)
    ]
    (row,) = fold_pinned(pinned)
    assert (row.times, row.sizes) == (2000, (3, 4))
    assert row.places == ("layers.*.conv.weight[2]", "layers.*.conv.weight[3]")
    assert row.where == "net.py:12  return self.conv(x)"


def where(layer: int) -> str:
    return f"layers.{layer}.conv (net.py:12)  return self.conv(x)"


def test_pins_of_different_lines_stay_apart() -> None:
    pins = [Pinned("a.weight", 0, 3, "addressed by position", f"a (net.py:{n})  x") for n in (1, 2)]
    assert len(fold_pinned(pins)) == 2


def test_layer_numbers_are_left_open_and_other_digits_are_not() -> None:
    assert pattern("h.0.mlp/ffn_channel#2") == "h.*.mlp/ffn_channel#2"
    assert pattern("0.conv1.weight") == "*.conv1.weight"
