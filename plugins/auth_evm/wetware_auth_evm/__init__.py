"""auth_evm: access control in a smart contract on any EVM chain, decided from a local replica."""
