"""Claim-bearing experiments of effml-arch, announced through the entry-point group `effml.experiments`."""
