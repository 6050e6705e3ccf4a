"""The driver of Python: source and zip archives, run by CPython in a WebAssembly component."""
