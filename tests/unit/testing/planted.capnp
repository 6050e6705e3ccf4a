@0xb3a1c5d7e9f00211;
using Ww = import "/wetware/schema/ww.capnp";

interface Shelf {
  open @0 (name :Text $Ww.name) -> (box :Box);
  count @1 (from :UInt32) -> (count :UInt64);
  drop @2 ();
}

interface Box {
  put @0 (value :Data) -> ();
  get @1 () -> (value :Data);
  watch @2 (sink :Sink) -> ();
}

interface Sink {
  changed @0 (value :Data) -> ();
}

interface Twin {
  have @0 (name :Text) -> (value :Data);
  wait @1 ();
  box @2 () -> (box :Box);
}
