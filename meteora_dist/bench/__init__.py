"""Measurements; never part of the tests, because a shared machine's clock proves nothing."""
