"""The way back in: prunec's directories without trust_remote_code, by our own copy of the code."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunec.codegen.modeling_prunec import Pruned
from prunec.errors import ModelError


def load(directory: str | Path, **kwargs: Any) -> Any:
    """Open a directory that prunec wrote. The code in it is not run.

    Args:
        kwargs: passed on to `from_pretrained`.

    Raises:
        ModelError: not a directory of prunec's, or written by a newer one.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"no readable config.json: {error}", where=str(folder)) from error
    names = config.get("architectures") or [""]
    cls = _stock(names[0].removeprefix("Prunec"), folder)
    if is_pruned(config):
        cls = pruned_class(cls)
    return cls.from_pretrained(str(folder), **kwargs).eval()


def is_pruned(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a directory whose class prunec generated."""
    found = config.get("prunec")
    if isinstance(found, dict) and found.get("format") != 1:
        raise ModelError(
            f"the directory has format {found.get('format')}, this prunec reads 1",
            fix="install a newer prunec, or open it with trust_remote_code=True",
        )
    return isinstance(found, dict)


def _stock(name: str, folder: Path) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise ModelError(f"transformers has no class {name!r}", where=str(folder / "config.json"))
    return cls


@functools.cache
def pruned_class(stock: Any) -> Any:
    """What modeling_prunec.py defines in a directory: the stock class with the table's sizes."""
    return type(f"Prunec{stock.__name__}", (Pruned, stock), {"__module__": __name__})


def register() -> None:
    """Let the Auto classes open prunec's directories without trust_remote_code.

    Dense models stay stock: only a config with a `prunec` table is treated differently. Calling it
    twice is calling it once.
    """
    import inspect

    from transformers.models.auto import modeling_auto

    for cls in vars(modeling_auto).values():
        if inspect.isclass(cls) and getattr(cls, "_model_mapping", None) is not None:
            for name in ("from_pretrained", "from_config"):
                method = getattr(cls, name).__func__
                if not hasattr(method, "_prunec"):
                    setattr(cls, name, classmethod(_aware(method)))


def _aware(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def open_pruned(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config", source)
        if not hasattr(config, "to_dict"):
            config = _config_of(source, kwargs)
        if kwargs.get("trust_remote_code") or not is_pruned(getattr(config, "__dict__", {})):
            return method(cls, source, *args, **kwargs)
        kwargs.pop("trust_remote_code", None)
        made = pruned_class(_task_class(cls, config))
        if method.__name__ == "from_config":
            return made._from_config(config, **kwargs)
        return made.from_pretrained(source, *args, **kwargs)

    open_pruned._prunec = True  # type: ignore[attr-defined]
    return open_pruned


def _config_of(source: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import PretrainedConfig

    hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
    found, _ = PretrainedConfig.get_config_dict(
        source, **{name: kwargs[name] for name in (*hub, "subfolder") if name in kwargs}
    )
    if not is_pruned(found):
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source)


def _task_class(auto: Any, config: Any) -> Any:
    """The stock class of an Auto class for this config: by the architecture, else the first."""
    known = auto._model_mapping[type(config)]
    known = known if isinstance(known, tuple) else (known,)
    wanted = {name.removeprefix("Prunec") for name in config.architectures or []}
    return next((cls for cls in known if cls.__name__ in wanted), known[0])
