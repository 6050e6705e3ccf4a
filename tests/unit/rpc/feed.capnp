@0xb0b7c1c9e6d4a2f1;
using Ww = import "/wetware/schema/ww.capnp";

interface Feed {
  follow @0 (sink :Ww.Sink) -> (subscription :Ww.Subscription);
}
