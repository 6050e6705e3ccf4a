"""Who is in the cluster, and alive: signed records of nodes, SWIM, and what keeps it running.

`record` is what a node says of itself, `known` what others know of it, `selector` names nodes by
what they are, `proof` shows a client that a node told the truth. `swim` decides who lives, without
I/O, on its parts; `wire` is how that travels. `service` runs it: `reach` keeps connections, `peers`
remembers addresses, `courier` and `inbound` carry frames, `twins` finds two processes with one key,
`dial_back` asks whether this node can be dialled, `findings` is what `ww doctor` says of all that.
"""
