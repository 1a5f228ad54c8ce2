"""The papers' perplexity protocols by name: one text, three window lengths.

All three tokenise the WikiText-2 test split whole, lines joined by a blank one, and average over
the tokens of non-overlapping windows. Values of different protocols do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunec.calibration.hub import hub_rows
from prunec.errors import CalibrationError
from prunec.events import Progress, silent

TEXT = "WikiText-2 test"


@dataclass(frozen=True)
class WindowProtocol:
    """A named window length on `TEXT`, and the papers whose tables use it."""

    name: str
    window: int
    papers: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        WindowProtocol("A", 128, "LLM-Pruner, SlimGPT, SlimLLM, FLAP, LoRAP"),
        WindowProtocol("B", 2048, "SparseGPT, Wanda, SliceGPT, SVD-LLM"),
        WindowProtocol("C", 4096, "LLM Surgeon, MoDeGPT, DISP-LLM"),
    )
}


def named_protocol(name: str) -> WindowProtocol:
    """The protocol A, B or C.

    Raises:
        CalibrationError: no such protocol.
    """
    if name.upper() not in PROTOCOLS:
        listed = ", ".join(f"{p.name} ({p.window} tokens)" for p in PROTOCOLS.values())
        raise CalibrationError(f"no perplexity protocol {name!r}", fix=f"there are: {listed}")
    return PROTOCOLS[name.upper()]


def wikitext2_test(progress: Progress = silent) -> str:
    """The text of the protocols, from the Hub or its cache.

    Raises:
        PluginError: the datasets package is not installed.
        CalibrationError: the Hub cannot be reached and its cache lacks the data set.
    """
    rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", progress)
    return "\n\n".join(str(row["text"]) for row in rows)
