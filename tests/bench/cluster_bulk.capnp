@0xb0d4cf8e2f6a1975;
interface Bulk {
  echo @0 (data :Data) -> (data :Data);
  run @1 (peers :List(Text)) -> ();     # send to these until told otherwise
  begin @2 (profile :Bool) -> ();       # figures count from now
  figures @3 () -> (json :Text);
}
