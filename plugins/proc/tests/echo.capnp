@0xe0a4f6b3c18e2797;
# What guests of the tests are granted.

using Ww = import "/wetware/schema/ww.capnp";

interface Echo {
  say @0 (data :Data) -> (data :Data);
  another @1 () -> (echo :Echo);
  # One that numbers what it says.
  handOn @2 (to :Echo, data :Data) -> (data :Data);
  # Says it to another.
  many @3 (count :UInt32) -> (echoes :List(Echo));
  untyped @4 (named :UInt64) -> (cap :Capability, interface :UInt64);
  # One that says that it has the interface `named`.
  stream @5 () -> (stream :Ww.ByteStream);
}
