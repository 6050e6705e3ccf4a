@0xc1a0c5c7d2be91f4;
using Ww = import "/wetware/schema/ww.capnp";

enum Color { red @0; green @1; deepBlue @2; }

struct Everything {
  aBool @0 :Bool;
  int8 @1 :Int8;
  int16 @2 :Int16;
  int32 @3 :Int32;
  int64 @4 :Int64;
  uint8 @5 :UInt8;
  uint16 @6 :UInt16;
  uint32 @7 :UInt32;
  uint64 @8 :UInt64;
  float32 @9 :Float32;
  float64 @10 :Float64;
  text @11 :Text = "default";
  data @12 :Data;
  color @13 :Color;
  inner @14 :Inner;
  texts @15 :List(Text);
  numbers @16 :List(Int32);
  blobs @17 :List(Data);
  inners @18 :List(Inner);
  grid @19 :List(List(UInt8));
  colors @20 :List(Color);
  place :group {
    x @21 :Int32;
    union {
      nowhere @22 :Void;
      name @23 :Text;
      cell @24 :Cell;
    }
  }
  cell @25 :Cell;
  cells @26 :List(Cell);
  anything @27 :AnyPointer;
  from @28 :Text;
  tree @29 :Tree;
}

struct Inner { name @0 :Text; count @1 :UInt32; }

struct Tree { left @0 :Tree; right @1 :Tree; value @2 :Int32; }

interface Cell {
  get @0 () -> (value :Data);
  set @1 (value :Data $Ww.constrained) -> ();
}

interface Counter extends(Cell) {
  add @0 (by :Int32 = 1) -> (total :Int64);
}

interface Zoo {
  echo @0 Everything -> Everything;
  data @1 (data :Data $Ww.constrained, name :Text) -> (data :Data);
  nothing @2 () -> ();
  fail @3 (how :Text) -> ();
  hang @4 () -> ();
  make @5 (value :Data) -> (cell :Cell);
  keep @6 (cell :Cell) -> ();
  kept @7 () -> (cell :Cell);
  use @8 (cell :Cell) -> (value :Data);
  any @9 (cap :Capability) -> (cap :Capability);
  counter @10 () -> (counter :Counter);
  makeMany @11 (count :UInt32) -> (cells :List(Cell));
  bits @12 (bits :List(Bool)) -> (count :UInt64);
  big @13 (bytes :UInt32) -> (data :Data);
  relay @14 (zoo :Zoo) -> (cell :Cell);
}

interface Newer { echo @0 () -> (); extra @1 () -> (); }
