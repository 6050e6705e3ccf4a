@0xd6ad1a7aa6d8e3f1;
# What wetware adds to Cap'n Proto's schema language. Use it as
#
#   using Ww = import "/wetware/schema/ww.capnp";
#   publish @0 (message :Data $Ww.constrained) -> ();

annotation constrained @0xb3c1de9a40f7c2a5 (field, param) :Void;
# A grant may put a constraint on this parameter (a topic's prefix, a blob's size); what can be said of
# which type is in docs/reference/constraints.md. A parameter without the annotation cannot be
# constrained: a grant that tries is refused, so that adding a parameter never widens an existing grant
# by accident. Taking the annotation away makes calls under existing constraints fail.

annotation name @0xa94d2f3e6b1c7085 (field, param) :Void;
# This parameter names an object of the service: it is what NAME is in `ww share SERVICE:NAME`. It can
# be constrained, too: `$Ww.constrained` is not needed beside it. In all that an interface leads to, the
# parameters with `$Ww.name` have one name, are no lists or structs, and are not within a struct; else
# the schema is refused when it is loaded. A parameter of that name is held to NAME in every method
# that has it: with `$Ww.constrained` it counts as marked, without either its method is not shared.

interface AnyCap @0xc8f5d0c1e94a7b36 {}
# A capability whose interface is not known yet; it has no methods until it is cast.
