"""The oracles: slicing equals masking, and permuting units changes nothing."""
