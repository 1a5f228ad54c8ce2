"""What is trained, towards what, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from prunec.errors import PlanError
from prunec.settings import read_settings

Train = Literal["lora", "scale", "full"]
Objective = Literal["next-token", "distill"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"objective": "next-token", "train": "lora"},
    "scale": {"objective": "next-token", "train": "scale", "learning_rate": 1e-3},
    "full": {"objective": "next-token", "train": "full", "learning_rate": 5e-5},
    "distill": {"objective": "distill", "train": "lora"},
}

_ROW_TOKENS = 256


@dataclass(frozen=True)
class Recovery:
    """Settings of a recovery.

    Attributes:
        objective: "next-token" (cross-entropy with the data) or "distill" (KL with the teacher).
        train: "lora" (peft, merged), "scale" (norms, and a factor per output of each linear layer,
            folded in), or "full".
        rank, alpha, dropout: of LoRA; the update is scaled by alpha / rank.
        learning_rate, weight_decay, warmup_steps, schedule: of AdamW; the schedule is cosine,
            linear or constant, over the steps or over the minutes, whichever limit is given.
        batch_size, micro_batch: rows a step, and rows at a time.
        seq_len: tokens a row; None for 256, or what the model reads at most.
        steps, epochs, minutes: when to stop; the first that is reached, None for no such limit.
        held_out: part of the rows that are not trained on, 0 to 1 (at least 4, at most 64 rows).
        evaluate_every: steps between measurements of the held-out loss; None for 20 in a run, or
            fewer in a run of minutes, of which they take at most a tenth.
        patience: measurements without improvement after which training stops.
        temperature, hard, hidden, top_k: of distillation: of the softmax; the weight, 0 to 1, of
            the cross-entropy; the weight of the hidden states' loss (0 leaves them out); and how
            many of the teacher's probabilities are kept, the rest as one (0 keeps all).
        packing: several samples in a row, where the model keeps them apart.
        gradient_checkpointing: recompute activations in the backward pass.
        bf16: mixed precision; None for wherever the GPU or the CPU has instructions for it.
        seed: of the order, the dropout and new weights.
    """

    name: str = "default"
    paper: str = ""
    objective: Objective = "next-token"
    train: Train = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: str = "cosine"
    batch_size: int = 8
    micro_batch: int | None = None
    seq_len: int | None = None
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    held_out: float = 0.05
    evaluate_every: int | None = None
    patience: int = 5
    temperature: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    top_k: int = 64
    packing: bool = True
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    seed: int = 0

    @property
    def row_tokens(self) -> int:
        """Tokens a row."""
        return self.seq_len or _ROW_TOKENS

    def override(self, settings: Mapping[str, Any]) -> Recovery:
        """These settings with others in their place.

        Raises:
            PlanError: a name there is none of (the nearest is named), or a value out of range.
        """
        known = [f.name for f in fields(self)]
        for key in settings:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                fix = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
                raise PlanError(f"recovery has no setting {key!r}", fix=fix)
        return replace(self, **{k: _typed(k, v) for k, v in settings.items()})._checked()

    def to_dict(self) -> dict[str, Any]:
        """As in a YAML file."""
        return asdict(self)

    def to_yaml(self) -> str:
        """A file that `load_recovery` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def _checked(self) -> Recovery:
        least = {"rank": 1, "batch_size": 1, "seq_len": 2, "steps": 1, "micro_batch": 1}
        least |= {"patience": 1, "top_k": 0, "hidden": 0, "warmup_steps": 0, "evaluate_every": 1}
        least |= {"weight_decay": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise PlanError(f"{name} is {value}, at least {bound} is needed")
        for name in ("learning_rate", "temperature", "epochs", "minutes", "alpha"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise PlanError(f"{name} is {value}, but must be above 0")
        for name in ("dropout", "held_out", "hard"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"{name} is {getattr(self, name)}, but is a part, 0 to 1")
        for name, allowed in (
            ("objective", get_args(Objective)),
            ("train", get_args(Train)),
            ("schedule", ("cosine", "linear", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise PlanError(f"{name} is {getattr(self, name)!r}", fix=f"{', '.join(allowed)}")
        if self.batch_size % (self.micro_batch or self.batch_size):
            raise PlanError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}"
            )
        return self


def recovery_names() -> list[str]:
    """The recoveries of papers that are shipped."""
    folder = files("prunec.recovery") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.is_file())


def load_recovery(name: str) -> Recovery:
    """The settings of a method, of a paper by its name, or of a YAML file by its path.

    Raises:
        PlanError: there is none, or the file holds something else.
    """
    if name in METHODS:
        return Recovery().override({"name": name, **METHODS[name]})
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise PlanError(f"no such file: {name}")
        text = path.read_text(encoding="utf-8")
    elif name in recovery_names():
        text = (files("prunec.recovery") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        names = ", ".join([*METHODS, *recovery_names()])
        raise PlanError(f"no recovery method or recipe {name!r}", fix=f"there are: {names}")
    data = read_settings(text, "the recipe", where=name)
    if not isinstance(data, dict):
        raise PlanError("a recovery recipe is a mapping of settings", where=name)
    return Recovery().override(data)


def _typed(name: str, value: Any) -> Any:
    """The value as the setting's own type."""
    hint = get_type_hints(Recovery)[name]
    kinds = [kind for kind in (get_args(hint) or (hint,)) if isinstance(kind, type)]
    if value is None and type(None) in kinds:
        return None
    wanted = next((kind for kind in kinds if kind is not type(None)), str)
    if wanted is bool and not isinstance(value, bool):
        raise PlanError(f"{name} is {value!r}, but is true or false")
    try:
        made = wanted(value)
    except (TypeError, ValueError) as error:
        kind = {int: "a whole number", float: "a number"}.get(wanted, "a text")
        raise PlanError(f"{name} is {value!r}, but must be {kind}") from error
    if wanted is int and made != float(value):
        raise PlanError(f"{name} is {value!r}, but is a whole number")
    return made
