"""Content-addressed storage: what is put has a CID, and as many members keep it as its pin says."""
