"""Pictures: what they show, that they render, and that nothing is left behind when they cannot."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
from pictured import three_layers

from prunec.errors import ExportError, PlanError
from prunec.graph.cost import flops, parameter_count
from prunec.graph.render import LEVELS, Level, draw, palette, render, to_node_link, write_picture
from prunec.graph.render.figures import Figures, short

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def svg(level: Level, **options: str) -> ElementTree.Element:
    picture = draw(three_layers(), level, **options)
    return ElementTree.fromstring(render(picture.source, "svg", picture.style))


def words(root: ElementTree.Element) -> list[str]:
    return [(element.text or "").strip() for element in root.iter(f"{SVG}text")]


def cells(root: ElementTree.Element, token: str) -> int:
    """How many coloured cells of a group there are."""
    ids = [element.get("id", "") for element in root.iter()]
    return sum(re.fullmatch(rf"(a_)?{token}-\d+", found) is not None for found in ids)


def token(name: str) -> str:
    names = [group.name for group in three_layers().groups]
    return f"g{names.index(name)}"


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_renders_to_a_page_wide_svg_that_names_no_other_resource(level: Level) -> None:
    root = svg(level)
    assert float(root.attrib["width"].removesuffix("pt")) < 1500
    links = {v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")}
    assert all(link.startswith("#g") for link in links)


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_picture_is_the_same_bytes(level: Level) -> None:
    assert draw(three_layers(), level) == draw(three_layers(), level)


def test_the_model_is_drawn_with_equal_layers_folded_and_the_span_of_their_sizes() -> None:
    found = words(svg("blocks"))
    assert "layers.0 to 2 (3 alike)" in found
    assert "ffn_channel 7 to 9" in found
    assert {"embed", "attention", "mlp", "head"} <= set(found)
    assert sum(word == "+" for word in found) == 2


def test_a_block_is_drawn_with_every_group_on_every_axis() -> None:
    root = svg("groups", block="layers.1")
    found = words(root)
    assert {"attention.qkv", "mlp.gate", "mlp.up", "mlp.down", "norm1"} <= set(found)
    assert not any("layers.0" in word for word in found)
    # one in the legend, then gate[0], up[0], down[1]
    assert cells(root, token("layers.1.mlp/ffn_channel")) == 4
    assert cells(root, token("layers.0.mlp/ffn_channel")) == 0
    # fused: the heads lie in the three segments of one axis, and in the input of the last linear
    assert cells(root, token("layers.1.attention/head")) == 5


def test_edges_carry_the_groups_that_flow_along_them() -> None:
    root = svg("groups", block="layers.1")
    classes = [element.get("class", "").split() for element in root.iter(f"{SVG}g")]
    edges = [found for found in classes if "edge" in found]
    channels = token("layers.1.mlp/ffn_channel")
    assert sum(channels in found for found in edges) == 3


def test_one_group_is_drawn_with_every_tensor_that_it_touches() -> None:
    root = svg("ops", group="layers.2.mlp/ffn_channel")
    found = words(root)
    assert found.count("weight") == 3
    assert {"linear", "silu", "mul"} <= set(found)
    assert not any(word.startswith("head") for word in found)


def test_a_group_of_all_layers_is_drawn_in_the_first_of_those_that_repeat() -> None:
    (hidden,) = [group for group in three_layers().groups if group.kind == "hidden"]
    found = words(svg("ops", group=hidden.name))
    assert any(word.startswith("layers.0.") for word in found)
    assert not any(word.startswith(("layers.1", "layers.2")) for word in found)


def test_values_colour_the_groups() -> None:
    coupling = three_layers()
    values = {group.name: float(i) for i, group in enumerate(coupling.groups)}
    picture = draw(coupling, "groups", values=values)
    root = ElementTree.fromstring(render(picture.source, "svg", picture.style))
    fills = {element.get("fill") for element in root.iter()}
    assert palette.FILLS["ffn_channel"] not in fills
    assert palette.scale(0) in fills
    assert palette.scale(1) in fills
    assert any("value" in word for word in words(root))


def test_colours_differ_by_kind_and_carry_dark_text() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    kinds = ("hidden", "ffn_channel", "kv_group", "query_head", "rope_pair", "value_dim", "expert")
    assert len({palette.paint(kind).fill for kind in kinds}) == len(kinds)
    for kind in kinds:
        for variant in range(5):
            found = palette.paint(kind, variant)
            contrast = (luminance(found.fill) + 0.05) / (luminance(found.text) + 0.05)
            assert contrast > 4.5, (kind, variant)


def test_an_unknown_block_or_group_is_named_with_its_nearest() -> None:
    with pytest.raises(ExportError, match=r"nearest: .*layers\.1\.mlp"):
        draw(three_layers(), "groups", block="layers.1.mpl")
    with pytest.raises(PlanError, match=r"nearest: .*layers\.1\.mlp/ffn_channel"):
        draw(three_layers(), "ops", group="layers.1.mlp/ffn_chanel")


def test_png_and_source_are_written_by_suffix(tmp_path: Path) -> None:
    picture = draw(three_layers())
    write_picture(picture, tmp_path / "block.png")
    write_picture(picture, tmp_path / "block.dot")
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "block.dot").read_text() == picture.source


@pytest.mark.parametrize("name", ["block.pdf", "block", "absent/block.svg"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError):
        write_picture(draw(three_layers()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def fake_dot(folder: Path, script: str) -> None:
    folder.mkdir()
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_the_systems_dot_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dot(tmp_path / "bin", "echo '<svg>drawn</svg>'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    assert render("digraph{}", "svg", "").strip() == b"<svg>drawn</svg>"


def test_a_failing_dot_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = draw(three_layers())
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "block.svg"
    target.write_text("old")
    fake_dot(tmp_path / "bin", "echo '<svg>half'; echo 'no memory left' >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(ExportError, match="no memory left"):
        write_picture(picture, target)
    assert [path.name for path in target.parent.iterdir()] == ["block.svg"]
    assert target.read_text() == "old"


def test_without_any_graphviz_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ExportError, match="pip install graphviz-pure"):
        write_picture(draw(three_layers()), tmp_path / "block.svg")
    assert list(tmp_path.iterdir()) == []


def test_the_cost_of_a_unit_is_the_difference_of_whole_models() -> None:
    coupling = three_layers()
    figures = Figures(coupling)
    for group in coupling.groups:
        fewer = {group.dim: group.size - 1}
        found = figures[group]
        assert found.parameters_per_unit == parameter_count(coupling) - parameter_count(
            coupling, fewer
        )
        assert found.flops_per_unit == flops(coupling) - flops(coupling, fewer)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0 k"),
        (999_949, "1000 k"),
        (6_738_415_616, "6.74 G"),
    ],
)
def test_counts_are_shortened_to_three_digits(count: int, expected: str) -> None:
    assert short(count) == expected


def test_node_link_tells_the_units_of_depth() -> None:
    data = to_node_link(three_layers())
    first = data["branches"][1]
    assert first["name"] == "layers.0/mlp"
    assert (first["kind"], first["block"]) == ("mlp", "layers.0")
    width = next(g["units"] for g in data["groups"] if g["name"] == "layers.0.mlp/ffn_channel")
    norm, multiplied = 2 * 12, 3 * 12 * width
    assert first["parameters"] == norm + multiplied
    assert first["flops"] == 2 * 10 * multiplied  # ten tokens
    projections = {f"layers.0.mlp.{name}.weight" for name in ("gate", "up", "down")}
    assert set(first["members"]) == {*projections, "layers.0.norm2.weight", "layers.0.norm2.bias"}
    assert len(data["branches"]) == 6


def test_node_link_reads_back_as_the_coupling_graph() -> None:
    coupling = three_layers()
    graph = nx.node_link_graph(to_node_link(coupling), edges="edges")
    grouped = [name for name, groups in coupling.graph.nodes(data="groups") if groups]
    assert set(grouped) <= set(graph)
    assert graph.number_of_edges() == coupling.graph.number_of_edges()
    members = {f"{m.parameter}[{m.axis}]" for m in coupling["layers.0.mlp/ffn_channel"].members}
    assert members <= nx.node_connected_component(graph, "layers.0.mlp.gate.weight[0]")


def test_every_field_of_the_json_is_documented() -> None:
    data = to_node_link(three_layers())
    documented = set(re.findall(r"`(\w+)`", (DOCS / "graph-json.md").read_text()))
    lists = ("groups", "branches", "pinned", "nodes", "edges")
    tables = [data["graph"], *(entry for name in lists for entry in data[name])]
    written = {key for table in [data, *tables] for key in table}
    assert written - documented == set()
