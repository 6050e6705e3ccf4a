@0xd3a1c5d7e9f00b17;
using Ww = import "/wetware/schema/ww.capnp";

interface Twin {
  who @0 () -> (principal :Text);
  wait @1 ();
  stream @2 () -> (stream :Ww.ByteStream);
}
interface Users {}
