"""The services that every node has, on the contract that plugins have."""
