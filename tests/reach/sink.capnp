@0xc3a1f5b07d9e2466;
using Ww = import "/wetware/schema/ww.capnp";

interface Sink {
  open @0 () -> (stream :Ww.ByteStream);
  # What is written is counted; behind its end, how many bytes it were, as text.
  ends @1 () -> (ends :List(Text));
  # Of the streams that have ended, in that order: how many bytes had come, and the error's code.
}
