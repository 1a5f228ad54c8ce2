"""Where calibration tokens come from: text files, and text that the dense model samples itself."""

from prunec.calibration.batches import Calibration, calibrate_text
from prunec.calibration.text import read_text

__all__ = ["Calibration", "calibrate_text", "read_text"]
