"""Who is in the cluster, and alive: signed records of nodes, SWIM, and what keeps it running.

`record` says what a node tells of itself, `wire` how it travels, `swim` decides who lives, without
I/O; `selector` names nodes by what they are.
"""
