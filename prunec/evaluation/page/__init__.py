"""One self-contained HTML page about one pruned model, or several beside each other."""

from prunec.evaluation.page.build import Picture, build_page
from prunec.evaluation.page.record import Case, Measured, read_case

__all__ = ["Case", "Measured", "Picture", "build_page", "read_case"]
