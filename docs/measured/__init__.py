"""What was measured, as the pages of this repository say it.

Raw measurements stand in docs/results; one module per page turns them into tables and sentences. A page asks for one
between two comments:

    <!-- [[[cog print(optim.speed()) ]]] -->
    ...
    <!-- [[[end]]] -->

`nox -s numbers` compares every page with what its measurements give, `nox -s numbers -- write` writes the pages anew,
`nox -s numbers -- record DIR...` first takes over finished runs (`effml reproduce` leaves a directory of them).
"""

__all__ = ["arch", "core", "diffusion", "evaluation", "front", "optim", "quant", "rl"]  # the modules of pages
