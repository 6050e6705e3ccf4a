@0xb1f6d0c5d2e84a11;
using Ww = import "/wetware/schema/ww.capnp";

interface Streams {
  open @0 () -> (stream :Ww.ByteStream);
  take @1 (stream :Ww.ByteStream) -> (stream :Ww.ByteStream);
  # Gives back what it was given.
  ping @2 () -> ();
  far @3 () -> (stream :Ww.ByteStream);
  # What `open` of another server returns.
  give @4 (stream :Ww.ByteStream) -> ();
  # Keeps the stream that it is handed, and reads and writes it.
  trust @5 () -> ();
  # Who calls it is no stranger from here on.
  passOn @6 (stream :Ww.ByteStream) -> ();
  # Gives the stream to another server.
}
