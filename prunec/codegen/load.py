"""The way back in: prunec's directories without trust_remote_code, by our own copy of the code."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunec.codegen.generated import FORMAT, pruned_class
from prunec.codegen.load_plain import is_plain, load_into
from prunec.errors import ModelError
from prunec.models.checkpoint import NO_JSON
from prunec.models.pretrained import as_model_errors, refuse_missing

_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def load(directory: str | Path, *, into: nn.Module | None = None, **kwargs: Any) -> Any:
    """Open a directory that prunec wrote, in eval mode. The code in it is not run.

    Args:
        directory: as `Result.save` wrote it.
        into: of a plain module: the class's own, with the sizes it had before pruning. It is
            changed: it gets the smaller sizes and the weights.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ModelError: not a model directory, written by a newer prunec, or weights are missing.
    """
    import transformers

    if into is not None:
        return load_into(into, Path(directory))
    config = read_config(Path(directory))
    named = config.get("architectures")
    name = str(named[0] if isinstance(named, list) and named else named).removeprefix("Prunec")
    found = getattr(transformers, name, None)
    if not (inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(f"transformers has no model class {name!r}", where=str(directory))
    cls: Any = found
    made = pruned_class(cls) if is_pruned(config) else cls
    with as_model_errors(Path(directory)):
        model, info = made.from_pretrained(str(directory), output_loading_info=True, **kwargs)
    refuse_missing(model, info, Path(directory))
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    if is_plain(directory):
        raise ModelError(
            "the directory holds a plain PyTorch module, whose class prunec does not know",
            where=str(directory),
            fix="in Python prunec.load(directory, into=module), or torch.export.load of model.pt2",
        )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, *NO_JSON) as error:
        raise ModelError(f"no readable config.json: {error}", where=str(directory)) from error
    if not isinstance(config, dict):
        raise ModelError("config.json holds no JSON object", where=str(directory))
    return config


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a directory whose class prunec generated.

    Raises:
        ModelError: by a prunec newer than this one.
    """
    table = config.get("prunec")
    if isinstance(table, dict) and table.get("format") != FORMAT:
        raise ModelError(
            f"the directory has format {table.get('format')}, this prunec reads {FORMAT}",
            fix="install a newer prunec, or open it with trust_remote_code=True",
        )
    return isinstance(table, dict)


def register() -> None:
    """Let the Auto classes open prunec's directories without trust_remote_code.

    Only a config with a `prunec` table is treated differently: dense models stay stock. Calling it
    twice is calling it once.
    """
    from transformers.models.auto import modeling_auto

    for cls in vars(modeling_auto).values():
        if inspect.isclass(cls) and getattr(cls, "_model_mapping", None) is not None:
            for name in ("from_pretrained", "from_config"):
                method = getattr(cls, name).__func__
                if not hasattr(method, "_prunec"):
                    setattr(cls, name, classmethod(_aware(method)))


def _aware(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def open_either(cls: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        config = None if kwargs.get("trust_remote_code") else _pruned_config(given, kwargs)
        if config is None:
            return method(cls, given, *args, **kwargs)
        mapping = {type(config): pruned_class(_class_for(cls, config))}
        ours = type(cls.__name__, (cls,), {"_model_mapping": mapping})
        return method(ours, given, *args, **kwargs)

    vars(open_either)["_prunec"] = True
    return open_either


def _pruned_config(given: Any, kwargs: Mapping[str, Any]) -> Any:
    """The config of a model that is ours; None for any other."""
    from transformers import AutoConfig, PretrainedConfig

    config = kwargs.get("config", given)
    if isinstance(config, PretrainedConfig):
        return config if is_pruned(vars(config)) else None
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    values, _ = PretrainedConfig.get_config_dict(given, **hub)
    return AutoConfig.from_pretrained(given, **hub) if is_pruned(values) else None


def _class_for(auto: Any, config: Any) -> Any:
    """The stock class of an Auto class for this config: by the architecture, else the first."""
    known = auto._model_mapping[type(config)]
    known = known if isinstance(known, tuple) else (known,)
    wanted = {name.removeprefix("Prunec") for name in config.architectures or ()}
    return next((cls for cls in known if cls.__name__ in wanted), known[0])
