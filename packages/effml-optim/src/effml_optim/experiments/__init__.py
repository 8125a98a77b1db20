"""Claim-bearing experiments of effml-optim, announced through the entry-point group `effml.experiments`."""
