"""The driver of WebAssembly: WASI preview 1 commands as fibers on the event loop."""
