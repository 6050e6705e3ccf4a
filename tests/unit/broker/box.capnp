@0xe3b1a7c9d5f20846;
using Ww = import "/wetware/schema/ww.capnp";

interface Box {
  put @0 (key :Text $Ww.constrained, data :Data $Ww.constrained) -> (size :UInt32);
  get @1 (key :Text $Ww.name) -> (data :Data);
  open @2 (key :Text $Ww.name) -> (item :Item);
  items @3 () -> (entries :List(Entry), first :Entry);
  watch @4 (sink :Sink) -> ();
  slow @5 () -> ();
  any @6 () -> (cap :Capability);
  keep @7 (item :Item) -> ();
  kept @8 () -> (item :Item);
  hand @9 (session :Capability, item :Item) -> ();
}

interface Item {
  read @0 () -> (data :Data);
  box @1 () -> (box :Box);
}

interface Sink {
  push @0 (item :Item, data :Data) -> (reply :Item);
}

struct Entry {
  key @0 :Text;
  item @1 :Item;
}
