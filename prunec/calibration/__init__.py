"""Where calibration samples come from: text, rows, data sets, images, loaders, the model itself."""

from prunec.calibration.batches import Calibration, SourceRecord, calibrate, collect
from prunec.calibration.text import read_text

calibrate_text = calibrate
"""The name that `calibrate` had when it read text only."""

__all__ = ["Calibration", "SourceRecord", "calibrate", "calibrate_text", "collect", "read_text"]
