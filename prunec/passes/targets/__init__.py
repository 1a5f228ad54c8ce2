"""Targets: how large the result may be, in what measure, and which sizes a layer may have."""
