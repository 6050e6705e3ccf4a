@0x9d5ae7b1c0f3e264;
using Ww = import "/wetware/schema/ww.capnp";

interface Echo {
  echo @0 (data :Data $Ww.constrained) -> (data :Data);
}

interface Pipes {
  open @0 () -> (stream :Ww.ByteStream);
  # An echo.
}
