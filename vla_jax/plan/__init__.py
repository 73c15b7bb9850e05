"""What a run will cost on a machine that is not here: fits or not, how fast, and what bounds it.

`launch/plan.py` is the story. `machines` names topologies, `programs` builds the product's own
train and control steps for them, `trace` and `loops` read what needs no compiler, `compilers` and
the `hlo` files read the compiled program, `roofline` makes times of it and `report` says all that.
"""
