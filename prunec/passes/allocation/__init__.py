"""Allocation: how much each block or site gives, from one rule for all to a search by trial."""
