"""A run from end to end: what joins the analysis, the passes and what leaves."""
