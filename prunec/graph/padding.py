"""Which tokens of a value are padding: of whose statistics nothing counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from prunec.errors import VerifyError
from prunec.graph.program import Program, source_line

_MASK = "attention_mask"
_DECODER = "decoder_"


class Padding:
    """The masks of some batches, found for any value of a program.

    A value that is computed from an input ``decoder_...`` has the decoder's tokens, any other the
    encoder's or only ones, even where both have the same number.
    """

    def __init__(self, program: Program, batches: Sequence[Mapping[str, Tensor]]):
        self._masks = [batch.get(_MASK) for batch in batches]
        self._decoder_masks = [batch.get(_DECODER + _MASK) for batch in batches]
        self._decoded: set[fx.Node] = set()
        for node in program.graph.nodes:
            own = program.inputs.get(node.name, "").startswith(_DECODER)
            if own or not self._decoded.isdisjoint(node.all_input_nodes):
                self._decoded.add(node)

    def real_tokens(self, batch: int, node: fx.Node, value: Tensor) -> Tensor | None:
        """Bool over all axes of a node's value but the last; None where no token is padding.

        Samples and tokens may be two axes of the value or, as some layers have it, one. A value
        with the samples alone (a pooled text) has no padding.

        Raises:
            VerifyError: there is padding, and where it is in this value cannot be told.
        """
        mask = (self._decoder_masks if node in self._decoded else self._masks)[batch]
        if mask is None or bool(mask.all()) or value.shape[:-1] == mask.shape[:1]:
            return None
        real = mask.bool().to(value.device)
        found = _spread(real, tuple(value.shape[:-1]))
        if found is None and _has_tokens(value.shape[:-1], *mask.shape):
            raise VerifyError(
                f"which of the tokens in {list(value.shape)} are padding is not known",
                where=source_line(node),
                so="statistics would count what is no text",
                fix="give samples of one length, without padding",
            )
        return found


def _spread(real: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Bool [rows, length] over leading axes of which one or two are the tokens'; None for none."""
    rows, length = real.shape
    for place in range(len(leading)):
        for sizes, mask in (
            ((rows, length), real),
            ((length, rows), real.T),
            ((rows * length,), real.flatten()),
        ):
            if leading[place : place + len(sizes)] == sizes:
                behind = [1] * (len(leading) - place - len(sizes))
                return mask.reshape(*sizes, *behind).expand(leading)
    if leading.count(rows) == leading.count(length) == 1 and leading.index(rows) == 0:
        return real.reshape([size if size in real.shape else 1 for size in leading]).expand(leading)
    return None


def _has_tokens(leading: Sequence[int], rows: int, length: int) -> bool:
    return any(size == length or size % (rows * length) == 0 for size in leading)
