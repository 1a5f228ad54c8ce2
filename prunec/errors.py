"""Every error that a user can cause.

    PrunecError
    ├── ModelError         a MODEL that cannot be opened: absent, no weights, truncated, a pickle
    ├── CalibrationError   calibration or evaluation text that cannot be used
    ├── TraceError         the model does not trace
    ├── DimError           axes that do not fit together
    │   └── MissingRule    an operator without a dim rule
    ├── PlanError          a ratio, plan or recipe that cannot be carried out
    ├── VerifyError        a check of the result failed; nothing was written
    ├── ExportError        the result cannot be written where or how it was asked for
    ├── CheckpointError    saved progress that does not belong to this run
    ├── ProcessError       another process of a run under torchrun has ended
    └── PluginError        a plug-in that is absent or does not load

The command line prints the message and exits with code 2. ``assert`` is for prunec's own bugs.
"""


class PrunecError(Exception):
    """What happened, where in the user's model or files, what follows, and what to do.

    >>> print(PrunecError("no such model: ./gpt", where="./gpt", fix="check the path"))
    no such model: ./gpt
      at   ./gpt
      fix  check the path
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        so: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.so = so
        self.fix = fix

    def __str__(self) -> str:
        notes = (("at", self.where), ("so", self.so), ("fix", self.fix))
        return "\n".join([self.message, *(f"  {tag:<4} {note}" for tag, note in notes if note)])


class ModelError(PrunecError):
    """A MODEL that cannot be opened."""


class CalibrationError(PrunecError):
    """Calibration or evaluation text that cannot be used."""


class TraceError(PrunecError):
    """The model does not trace."""


class DimError(PrunecError):
    """Axes that do not fit together."""


class MissingRule(DimError):  # noqa: N818 - named after what is missing, as users meet it
    """An operator without a dim rule."""


class PlanError(PrunecError):
    """A ratio, plan or recipe that cannot be carried out."""


class VerifyError(PrunecError):
    """A check of the result failed; nothing was written."""


class ExportError(PrunecError):
    """The result cannot be written where or how it was asked for."""


class CheckpointError(PrunecError):
    """Saved progress that does not belong to this run."""


class ProcessError(PrunecError):
    """Another process of a run under torchrun has ended."""


class PluginError(PrunecError):
    """A plug-in that is absent or does not load."""
