// SPDX-License-Identifier: MIT
// Contract wallets for tests: one that is as it should be, and ones that are not.
pragma solidity 0.8.37;

bytes4 constant MAGIC = 0x1626ba7e;

/// Any one of its owners signs; it changes them itself.
contract OwnersWallet {
    mapping(address => bool) public owners;

    constructor(address first) {
        owners[first] = true;
    }

    function setOwner(address owner, bool is_) external {
        owners[owner] = is_;
    }

    function isValidSignature(bytes32 hash, bytes calldata signature) external view returns (bytes4) {
        if (signature.length != 65) return 0xffffffff;
        address by = ecrecover(hash, uint8(signature[64]), bytes32(signature[:32]), bytes32(signature[32:64]));
        return by != address(0) && owners[by] ? MAGIC : bytes4(0xffffffff);
    }
}

contract SaysYes {
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        return MAGIC;
    }
}

contract SaysNo {
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        return 0xffffffff;
    }
}

contract Loops {
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        while (true) {}
        return MAGIC;
    }
}

/// Answers with so many bytes, the right ones first.
contract Answers {
    uint256 immutable size;

    constructor(uint256 bytes_) {
        size = bytes_;
    }

    fallback() external {
        uint256 length = size;
        assembly {
            mstore(0, shl(224, 0x1626ba7e))
            return(0, length)
        }
    }
}

/// Reverts with so many bytes, the right ones first.
contract Reverts {
    uint256 immutable size;

    constructor(uint256 bytes_) {
        size = bytes_;
    }

    fallback() external {
        uint256 length = size;
        assembly {
            mstore(0, shl(224, 0x1626ba7e))
            revert(0, length)
        }
    }
}

/// The magic value on the wrong side of the word, as a careless caller would take it.
contract AnswersANumber {
    function isValidSignature(bytes32, bytes calldata) external pure returns (uint32) {
        return uint32(MAGIC);
    }
}
