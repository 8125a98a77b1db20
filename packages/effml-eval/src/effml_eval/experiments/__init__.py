"""Experiments: what the papers claim, measured here."""
