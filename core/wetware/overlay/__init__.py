"""How nodes connect: the data path, libp2p beside it, who is a member, and who is there."""
