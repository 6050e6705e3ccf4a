"""What `ww doctor` finds on this machine, without a node; what a node finds is `node.findings`.

A check gives findings and never raises: what it cannot judge is a finding too, or nothing where
nothing can be known. Whatever is not fine says what to do next. Each check has its own time limit,
and the functions that judge take plain values, so that they are tested without a broken machine.

Heavy modules are imported inside the checks: a missing library is a finding, not a traceback.
"""
