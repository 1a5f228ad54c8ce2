"""Where calibration samples come from: text, rows, data sets, images, loaders, the model itself."""

from prunec.calibration.batches import Calibration, SourceRecord, calibrate, collect
from prunec.calibration.text import read_text

__all__ = ["Calibration", "SourceRecord", "calibrate", "collect", "read_text"]
