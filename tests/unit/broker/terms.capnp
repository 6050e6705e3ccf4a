@0xf4c1d7a90b3e5826;
# A service with parameters of every type, for constraints.

using Ww = import "/wetware/schema/ww.capnp";

interface Shop {
  enter @0 (room :Text $Ww.name, age :UInt8 $Ww.constrained, note :Text) -> (room :Room);
  every @1 (
      text :Text $Ww.constrained, data :Data $Ww.constrained, count :Int64 $Ww.constrained,
      ratio :Float64 $Ww.constrained, really :Bool $Ww.constrained, colour :Colour $Ww.constrained,
      items :List(Text) $Ww.constrained, whole :Box $Ww.constrained) -> ();
  choose @2 Choice -> ();
  serve @3 (visitor :Visitor) -> ();
}

interface Room extends(Door) {
  say @0 (text :Text $Ww.constrained) -> ();
}

interface Door {
  knock @0 (times :UInt32 $Ww.constrained) -> (others :List(Entry));
}

struct Entry {
  bell @0 :Bell;
}

interface Bell {
  ring @0 (loud :Bool $Ww.constrained) -> ();
}

interface Visitor {
  # Made by the caller: nothing of it is granted.
  shown @0 (text :Text $Ww.constrained, gift :Gift) -> (back :Secret);
}

interface Gift {
  # Given to the caller's own object: the caller can hold it.
  open @0 (key :Text $Ww.constrained) -> ();
}

interface Secret {
  # Comes from the caller.
  tell @0 (text :Text $Ww.constrained) -> ();
}

enum Colour { red @0; darkBlue @1; }

struct Box { size @0 :UInt32; }

struct Choice {
  union {
    name @0 :Text $Ww.constrained;
    number @1 :UInt32 $Ww.constrained;
  }
  from @2 :Text $Ww.constrained;
}
