"""The driver of native programs: bubblewrap, and nothing of the node but one socket."""
