// A program in AssemblyScript: it reads its argument, publishes it to what it was given as "echo", and says what came back.
@external("wasi_snapshot_preview1", "args_sizes_get") declare function args_sizes_get(count: usize, size: usize): i32;
@external("wasi_snapshot_preview1", "args_get") declare function args_get(argv: usize, buffer: usize): i32;
@external("wasi_snapshot_preview1", "fd_write") declare function fd_write(fd: i32, vectors: usize, count: i32, written: usize): i32;
@external("wasi_snapshot_preview1", "proc_exit") declare function proc_exit(code: i32): void;
@external("ww", "cap") declare function ww_cap(name: usize, count: u32): i32;
@external("ww", "call") declare function ww_call(handle: i32, message: usize, count: u32): i32;
@external("ww", "take") declare function ww_take(buffer: usize, count: u32): i32;

const numbers = memory.data(16), argv = memory.data(64), buffer = memory.data(4096), message = memory.data(4096);

function print(at: usize, count: u32): void {
  store<u32>(numbers, <u32>at);
  store<u32>(numbers, count, 4);
  fd_write(1, numbers, 1, numbers + 8);
}

function printed(text: string): void {
  const data = String.UTF8.encode(text);
  print(changetype<usize>(data), data.byteLength);
}

export function _start(): void {
  args_sizes_get(numbers, numbers + 4);
  if (load<u32>(numbers) != 2) proc_exit(2);
  args_get(argv, buffer);
  const word = <usize>load<u32>(argv, 4);
  let length: u32 = 0;
  while (load<u8>(word + length)) length++;
  // CBOR: ["say", {"data": bytes}]
  const head: u8[] = [0x82, 0x63, 0x73, 0x61, 0x79, 0xa1, 0x64, 0x64, 0x61, 0x74, 0x61, 0x58, <u8>length];
  for (let i = 0; i < head.length; i++) store<u8>(message + i, head[i]);
  memory.copy(message + head.length, word, length);
  const name = String.UTF8.encode("echo");
  const count = ww_call(ww_cap(changetype<usize>(name), 4), message, head.length + length);
  if (count < 0) {
    printed("error " + count.toString() + "\n");
    proc_exit(1);
  }
  ww_take(message, 4096);
  print(message + count - length, length);
  printed("\n");
}
