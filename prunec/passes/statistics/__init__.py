"""Statistics: what is measured while batches stream by, and what the dense model is scored with."""
