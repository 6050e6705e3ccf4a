@0xd6ad1a7aa6d8e3f1;
# What wetware adds to Cap'n Proto's schema language. Use it as
#
#   using Ww = import "/wetware/schema/ww.capnp";
#   publish @0 (message :Data $Ww.constrained) -> ();

annotation constrained @0xb3c1de9a40f7c2a5 (field, param) :Void;
# A grant may put a predicate on this parameter (a topic's prefix, a blob's size). A parameter without
# the annotation cannot be constrained: a grant that tries is refused, so that adding a parameter
# never widens an existing grant by accident.

interface AnyCap @0xc8f5d0c1e94a7b36 {}
# A capability whose interface is not known yet; it has no methods until it is cast.
