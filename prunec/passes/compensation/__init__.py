"""Compensation: what the weights that stay take over from those that go."""
