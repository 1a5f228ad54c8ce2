from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from expecttest import assert_expected_inline as expect

from prunec import registry
from prunec.errors import PluginError
from prunec.passes.recipe import Part

PACKAGE = """
[prunec.importance]
{name} = {value}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a package on the path that declares one importance plug-in."""

    def installed(package: str, name: str, value: str) -> None:
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(PACKAGE.format(name=name, value=value))
        registry._declared.cache_clear()

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield installed
    registry._declared.cache_clear()


def message(group: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        registry.plugin(group, name)
    return str(caught.value)


def test_the_built_ins_are_declared() -> None:
    assert registry.names("importance") == [
        "block-influence",
        "divergence",
        "feature-space",
        "fisher",
        "fluctuation",
        "last-first",
        "magnitude",
        "obs",
        "pearson",
        "random",
        "slimllm",
        "taylor",
        "wanda",
    ]
    assert {"log-increase", "uniform"} <= set(registry.names("allocation"))
    assert registry.names("compensation") == ["bias", "least-squares", "none", "obs", "scale-bias"]
    assert registry.names("exporters") == ["deci", "gguf", "onnx", "padded", "pt2", "python"]


@pytest.mark.parametrize("group", registry.GROUPS)
def test_every_built_in_loads(group: str) -> None:
    for name in registry.names(group):
        assert callable(registry.plugin(group, name))


def test_a_package_adds_a_plug_in(install) -> None:
    install("mine", "counted", "collections:Counter")
    assert "counted" in registry.names("importance")
    assert registry.plugin("importance", "counted").__name__ == "Counter"


def test_an_unknown_name_names_the_nearest() -> None:
    expect(
        message("importance", "magnitud"),
        """\
no importance named 'magnitud'
  fix  did you mean 'magnitude'? There are: block-influence, divergence, feature-space, fisher, fluctuation, last-first, magnitude, obs, pearson, random, slimllm, taylor, wanda""",
    )


def test_an_unknown_group_names_the_nearest() -> None:
    assert "did you mean 'importance'" in message("importances", "obs")


def test_a_plug_in_that_does_not_load_says_whose_it_is(install) -> None:
    install("mine", "broken", "no_such_module_at_all:Mine")
    expect(
        message("importance", "broken"),
        """\
the importance plug-in 'broken' does not load: No module named 'no_such_module_at_all'
  at   mine: no_such_module_at_all:Mine
  fix  reinstall or repair that package""",
    )


def test_a_plug_in_whose_module_raises_is_one_message(
    install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_plug_in.py").write_text("raise ValueError('no licence')")
    install("mine", "raising", "raising_plug_in:Mine")
    assert "'raising' does not load: no licence\n  at   mine:" in message("importance", "raising")


def test_a_plug_in_that_is_no_dataclass_is_one_message(install) -> None:
    install("mine", "counted", "collections:Counter")
    with pytest.raises(PluginError, match="'counted' is no dataclass"):
        Part("counted", {}).build("importance")


def test_two_packages_with_one_name_are_an_error(install) -> None:
    install("mine", "obs", "collections:Counter")
    assert "two importance plug-ins are named 'obs'" in message("importance", "obs")
    assert registry.plugin("importance", "wanda").__name__ == "Wanda"
