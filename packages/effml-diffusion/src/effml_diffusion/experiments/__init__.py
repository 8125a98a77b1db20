"""Claim-bearing experiments of effml-diffusion, announced through the entry-point group `effml.experiments`."""
