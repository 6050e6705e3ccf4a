@0x9d5ae7b1c0f3e264;
interface Echo {
  echo @0 (data :Data) -> (data :Data);
}
