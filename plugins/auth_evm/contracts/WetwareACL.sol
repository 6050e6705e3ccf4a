// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title WetwareACL/1: who holds which role, in which scope, with which rights, until when.
/// @notice The access list of one organisation, for any number of clusters. What a role and a bit of a
/// rights mask allow is policy of the nodes; this contract says who holds them.
///
/// It is meant to be followed from its logs. Every change takes the next `seq`, emits one event, and folds
/// that event, byte for byte, into `head`: two storage slots commit to the whole history, so that a follower
/// from whom a log is hidden finds out.
///
/// @dev Decisions that the rest hangs on:
///
/// Two levels, not a tree. The owner grants and appoints admins; an admin grants, and appoints nobody.
/// Whoever holds a role delegates further off chain, by capabilities; on chain that would cost a walk for
/// every decision and buy nothing.
///
/// Nothing that an admin granted exceeds or outlives the admin. A grant names the admin record under which
/// it was made, and stands only while that very tenure of the record lives, with rights and expiry cut down
/// to it at every moment. Removing an admin (or `revokeAll`, `resetScope`, its expiry) therefore ends what
/// it granted in the same transaction, for good: a later appointment is a new tenure and revives nothing.
/// The alternative, grants that stay, would leave what a stolen admin key handed out to be hunted down one
/// by one. The price: to change admins without a gap, the owner takes the grants over first.
///
/// An admin touches only what it granted: two admins of one role cannot fight over an account, and a stolen
/// admin key cannot lock out those whom others let in. Withdrawing in an emergency is the guardians' part.
///
/// A record's `serial` is the seq at which its unbroken tenure began: renewing a record that still stands
/// keeps the serial; whatever lapsed or was withdrawn gets a new one. What hangs on a record (an admin's
/// grants, a grant's bound keys) has a higher serial than the tenure that it hangs on, and so does not
/// survive it. The epoch of an account or scope is the seq of the last `revokeAll` or `resetScope`: only
/// records with a higher serial stand, and an epoch never returns to an earlier value.
///
/// Strangers change nothing: only the owner, the proposed owner, and accounts to which something was granted
/// can bump `seq`. So nobody can flood the followers.
///
/// No external calls, hence no reentrancy. No immutables: the runtime code is the same on every chain.
/// `docs/reference/auth-evm-contract.md` has the storage layout and the rules in a form to code against.
contract WetwareACL {
    /// One grant to make, see `grant`.
    struct GrantItem {
        bytes32 scope;
        bytes32 role;
        address account;
        uint40 notBefore;
        uint40 expiry;
        uint128 rights;
    }

    struct Grant {
        uint40 notBefore;
        uint40 expiry;
        uint48 serial;
        uint128 rights;
        address by; // 0: the owner; else the admin
        uint8 via; // under which of its records: bit 0: role ANY, bit 1: scope ROOT
    }

    struct Admin {
        uint40 expiry;
        uint48 serial;
        uint128 rights;
    }

    struct Key {
        uint40 expiry;
        uint48 serial;
    }

    struct Account {
        uint48 epoch;
        uint16 keys; // bound since the epoch
    }

    /// A record in ROOT holds in every scope.
    bytes32 public constant ROOT = 0;
    /// An admin record for ANY is for every role. No grant is of this role.
    bytes32 public constant ANY = 0;
    /// Held in ROOT: may withdraw in an emergency (`pause`, `revokeAll`, `unbindKey`), and add nothing.
    bytes32 public constant GUARDIAN = "guardian";
    bytes32 public constant VERSION = "WetwareACL/1";

    /// A right that nobody renews ends.
    uint40 public constant MAX_TTL = 400 days;
    /// Long enough for the rightful owner to notice and withdraw a proposal made with a stolen key.
    uint40 public constant OWNER_DELAY = 2 days;
    /// A forgotten proposal must not be a standing offer.
    uint40 public constant OWNER_WINDOW = 14 days;
    /// Items of `grantMany`, roles of `bindKey`: a full batch fits a transaction of 2^24 gas (EIP-7825).
    uint256 public constant MAX_BATCH = 100;
    /// Bound keys of an account: bounds what one holder of a role can make every follower keep.
    uint16 public constant MAX_KEYS = 1000;

    // Slot 0, full. The order is part of the reference: followers read the slots by number.
    address public owner;
    bool public paused;
    uint48 public seq;
    uint40 public changedAt; // block number of the last change
    // Slot 1.
    bytes32 public head;
    // Slot 2.
    address public pendingOwner;
    uint40 public ownerReadyAt;
    // Slots 3 to 7.
    mapping(bytes32 recordKey => Grant) private _grants;
    mapping(bytes32 recordKey => Admin) private _admins;
    mapping(bytes32 keyKey => Key) private _keys;
    mapping(address account => Account) private _accounts;
    mapping(bytes32 scope => uint48) private _scopeEpochs;

    // Every event has the topics (signature, seq, account, scope): `_record` relies on it.
    event Granted(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, bytes32 role,
        uint40 notBefore, uint40 expiry, uint128 rights, uint48 serial, address by, uint8 via
    );
    event Revoked(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, bytes32 role, address by
    );
    /// Everything of the account; `scope` is ROOT. The account's epoch is now `seq`.
    event RevokedAll(uint48 indexed seq, address indexed account, bytes32 indexed scope, address by);
    /// Every record in the scope; `account` is the caller. The scope's epoch is now `seq`.
    event ScopeReset(uint48 indexed seq, address indexed account, bytes32 indexed scope);
    /// `rights` 0: the record is removed.
    event AdminSet(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, bytes32 role,
        uint40 expiry, uint128 rights, uint48 serial, address by
    );
    /// The binding's serial is `seq`.
    event KeyBound(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, bytes32 role, bytes32 key,
        uint40 expiry
    );
    event KeyUnbound(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, bytes32 role, bytes32 key,
        address by
    );
    /// `account` is the caller, `scope` is ROOT.
    event Paused(uint48 indexed seq, address indexed account, bytes32 indexed scope);
    /// `account` is the caller, `scope` is ROOT.
    event Unpaused(uint48 indexed seq, address indexed account, bytes32 indexed scope);
    /// `account` is the proposed owner, 0 if the proposal is withdrawn; `scope` is ROOT.
    event OwnerProposed(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, uint40 readyAt
    );
    /// `account` is the new owner, `scope` is ROOT.
    event OwnerChanged(
        uint48 indexed seq, address indexed account, bytes32 indexed scope, address previous
    );

    /// Only the owner may do this.
    error NotOwner(address caller);
    /// Only the owner or a guardian may do this.
    error NotGuardian(address caller);
    /// The caller is no admin of this role in this scope, or no longer.
    error NotAdmin(bytes32 scope, bytes32 role, address caller);
    /// The grant would exceed the caller's own admin record, which allows at most this.
    error ExceedsAdmin(uint128 rights, uint40 expiry);
    /// Somebody else's grant (`by`; 0: the owner's) stands: only they, the owner or the holder may end it.
    error HeldByAnother(address by);
    /// There is no such grant, or the caller's does not stand.
    error NoGrant(bytes32 scope, bytes32 role, address account);
    /// There is no such admin record.
    error NoAdmin(bytes32 scope, bytes32 role, address account);
    /// The key is not bound to this grant.
    error NoKey(bytes32 scope, bytes32 role, address account, bytes32 key);
    error ZeroAccount();
    error ZeroRole();
    error ZeroRights();
    error ZeroKey();
    /// The expiry has passed, or is not after `notBefore`.
    error ExpiryTooEarly(uint40 expiry, uint256 after_);
    /// The expiry is more than MAX_TTL away.
    error ExpiryTooLate(uint40 expiry, uint256 max);
    /// A batch has 1 to MAX_BATCH items.
    error BadBatch(uint256 items);
    /// The account has MAX_KEYS bound keys; unbind some.
    error TooManyKeys(address account);
    /// Already paused, or adding is refused while paused.
    error IsPaused();
    error IsNotPaused();
    /// The caller is not the proposed owner.
    error NotProposed(address caller);
    /// The proposal can be accepted from `readyAt` until before `closesAt`.
    error NotInWindow(uint256 readyAt, uint256 closesAt);

    /// @param owner_ The owner from the start, usually not the deployer: a multisig, a hardware wallet.
    constructor(address owner_) {
        if (owner_ == address(0)) revert ZeroAccount();
        // Two deployments never share a head, so that a checkpoint of one is none of another.
        head = keccak256(abi.encode(VERSION, block.chainid, address(this)));
        owner = owner_;
        _record(abi.encode(OwnerChanged.selector, _next(), owner_, ROOT, address(0)));
    }

    // --- Granting --------------------------------------------------------------------------------------

    /// @notice Grant `role` in `scope` to `account`, or change the bounds of its grant.
    /// @dev By the owner, or by an admin within its record, and then no longer than the record lives. Of the
    /// caller's records the first that covers the grant is used, in the order of `Grant.via`: (scope, role),
    /// (scope, ANY), (ROOT, role), (ROOT, ANY). GUARDIAN is granted by the owner only: it can do what no
    /// admin can. The owner may grant while paused, so as to repair.
    /// @param notBefore From when; may have passed, 0 for now.
    /// @param expiry Until before when, at most MAX_TTL from now.
    function grant(
        bytes32 scope, bytes32 role, address account, uint40 notBefore, uint40 expiry, uint128 rights
    ) external {
        _grant(GrantItem(scope, role, account, notBefore, expiry, rights));
    }

    /// @notice All of `items`, or none.
    function grantMany(GrantItem[] calldata items) external {
        _checkBatch(items.length);
        for (uint256 i; i < items.length; ++i) _grant(items[i]);
    }

    /// @notice Appoint `account` admin of `role` (ANY: of every role) in `scope`, change its bounds, or, with
    /// `rights` and `expiry` 0, remove it.
    /// @dev By the owner; an admin may remove itself. Removing ends what the admin granted under the record,
    /// for good. Narrowing narrows it, and widening again widens it up to what was granted.
    function setAdmin(bytes32 scope, bytes32 role, address account, uint40 expiry, uint128 rights) external {
        bool removes = rights == 0 && expiry == 0;
        if (msg.sender != owner && !(removes && msg.sender == account)) revert NotOwner(msg.sender);
        bytes32 k = _recordKey(scope, role, account);
        Admin storage a = _admins[k];
        uint48 n = _next();
        uint48 serial;
        if (removes) {
            if (a.serial == 0) revert NoAdmin(scope, role, account);
            delete _admins[k];
        } else {
            if (account == address(0)) revert ZeroAccount();
            if (rights == 0) revert ZeroRights();
            _checkExpiry(0, expiry);
            serial = _lives(a, scope, account) ? a.serial : n;
            _admins[k] = Admin(expiry, serial, rights);
        }
        _record(
            abi.encode(AdminSet.selector, n, account, scope, role, expiry, rights, serial, msg.sender)
        );
    }

    // --- Withdrawing: always possible, paused or not -----------------------------------------------------

    /// @notice End one grant and what hangs on it.
    /// @dev By the owner, the holder, or the admin that granted it and still is one. The owner and the holder
    /// may also clear away a record that no longer stands.
    function revoke(bytes32 scope, bytes32 role, address account) external {
        bytes32 k = _recordKey(scope, role, account);
        Grant storage g = _grants[k];
        if (g.serial == 0) revert NoGrant(scope, role, account);
        if (msg.sender != owner && msg.sender != account) {
            if (msg.sender != g.by) revert HeldByAnother(g.by);
            if (!_stands(g, scope, role, account)) revert NotAdmin(scope, role, msg.sender);
        }
        delete _grants[k];
        _record(abi.encode(Revoked.selector, _next(), account, scope, role, msg.sender));
    }

    /// @notice End every grant, admin record and bound key of `account`, and every session key that it signed.
    /// @dev By the owner or a guardian. Also of an account that holds nothing: its session keys end.
    function revokeAll(address account) external {
        _checkGuardian();
        if (account == address(0)) revert ZeroAccount();
        _revokeAll(account);
    }

    /// @notice The same for the caller itself, which names a grant or admin record of its own.
    /// @dev Naming one costs nothing to store, and keeps strangers out.
    function renounceAll(bytes32 scope, bytes32 role) external {
        bytes32 k = _recordKey(scope, role, msg.sender);
        if (!_stands(_grants[k], scope, role, msg.sender) && !_lives(_admins[k], scope, msg.sender)) {
            revert NoGrant(scope, role, msg.sender);
        }
        _revokeAll(msg.sender);
    }

    /// @notice End every record in `scope`, and every session key for it.
    /// @dev By the owner. ROOT: the records in ROOT, guardians included, and what admins in ROOT granted in
    /// any scope; not the other records in other scopes.
    function resetScope(bytes32 scope) external {
        _checkOwner();
        uint48 n = _next();
        _scopeEpochs[scope] = n;
        _record(abi.encode(ScopeReset.selector, n, msg.sender, scope));
    }

    /// @notice Until `unpause`, nobody holds any role and nobody but the owner can add anything.
    /// @dev By the owner or a guardian. Records stay as they are.
    function pause() external {
        _checkGuardian();
        if (paused) revert IsPaused();
        paused = true;
        _record(abi.encode(Paused.selector, _next(), msg.sender, ROOT));
    }

    /// @notice By the owner: a guardian can stop, and not start again.
    function unpause() external {
        _checkOwner();
        if (!paused) revert IsNotPaused();
        paused = false;
        _record(abi.encode(Unpaused.selector, _next(), msg.sender, ROOT));
    }

    // --- Keys of headless nodes and multisigs ------------------------------------------------------------

    /// @notice Let `key`, an Ed25519 public key, act with the caller's `roles` in `scope`.
    /// @dev Each role is one that the caller was granted in this very scope and that stands. The binding ends
    /// with its expiry, with `unbindKey`, and with the tenure of the grant. The holder of `key` is not asked:
    /// a binding gives it rights and takes none from it.
    function bindKey(bytes32 scope, bytes32[] calldata roles, bytes32 key, uint40 expiry) external {
        if (paused) revert IsPaused();
        if (key == 0) revert ZeroKey();
        _checkBatch(roles.length);
        _checkExpiry(0, expiry);
        Account storage account = _accounts[msg.sender];
        for (uint256 i; i < roles.length; ++i) {
            bytes32 role = roles[i];
            if (!_stands(_grants[_recordKey(scope, role, msg.sender)], scope, role, msg.sender)) {
                revert NoGrant(scope, role, msg.sender);
            }
            Key storage k = _keys[_keyKey(scope, role, msg.sender, key)];
            if (k.serial <= account.epoch) {
                if (account.keys >= MAX_KEYS) revert TooManyKeys(msg.sender);
                ++account.keys;
            }
            uint48 n = _next();
            k.expiry = expiry;
            k.serial = n;
            _record(abi.encode(KeyBound.selector, n, msg.sender, scope, role, key, expiry));
        }
    }

    /// @notice End bindings of `key`. By the account, the owner or a guardian.
    function unbindKey(bytes32 scope, bytes32[] calldata roles, address account, bytes32 key) external {
        if (msg.sender != account) _checkGuardian();
        _checkBatch(roles.length);
        for (uint256 i; i < roles.length; ++i) {
            bytes32 k = _keyKey(scope, roles[i], account, key);
            uint48 serial = _keys[k].serial;
            if (serial == 0) revert NoKey(scope, roles[i], account, key);
            delete _keys[k];
            // One from before the account's epoch is not counted any more.
            if (serial > _accounts[account].epoch) --_accounts[account].keys;
            _record(
                abi.encode(KeyUnbound.selector, _next(), account, scope, roles[i], key, msg.sender)
            );
        }
    }

    // --- Owner -------------------------------------------------------------------------------------------

    /// @notice Offer the ownership to `next`, in place of any earlier offer; 0 withdraws the offer.
    function proposeOwner(address next) external {
        _checkOwner();
        pendingOwner = next;
        ownerReadyAt = next == address(0) ? 0 : uint40(block.timestamp) + OWNER_DELAY;
        _record(abi.encode(OwnerProposed.selector, _next(), next, ROOT, ownerReadyAt));
    }

    /// @notice Take the ownership, from OWNER_DELAY after the offer on, for OWNER_WINDOW.
    /// @dev What earlier owners granted stays: it is the organisation's.
    function acceptOwner() external {
        if (msg.sender != pendingOwner) revert NotProposed(msg.sender);
        uint256 readyAt = ownerReadyAt;
        if (block.timestamp < readyAt || block.timestamp >= readyAt + OWNER_WINDOW) {
            revert NotInWindow(readyAt, readyAt + OWNER_WINDOW);
        }
        address previous = owner;
        owner = msg.sender;
        pendingOwner = address(0);
        ownerReadyAt = 0;
        _record(abi.encode(OwnerChanged.selector, _next(), msg.sender, ROOT, previous));
    }

    // --- Reading -----------------------------------------------------------------------------------------

    /// @notice What of the state is one of a kind, in one call.
    function state()
        external
        view
        returns (
            uint48 seq_, bytes32 head_, uint40 changedAt_, address owner_, bool paused_,
            address pendingOwner_, uint40 ownerReadyAt_
        )
    {
        return (seq, head, changedAt, owner, paused, pendingOwner, ownerReadyAt);
    }

    /// @notice The epochs that a session key of `account` for `scope` is signed under.
    function epochs(bytes32 scope, address account)
        external
        view
        returns (uint48 scopeEpoch, uint48 rootEpoch, uint48 accountEpoch)
    {
        return (_scopeEpochs[scope], _scopeEpochs[ROOT], _accounts[account].epoch);
    }

    /// @notice The grant as stored, whether or not it stands.
    function grantOf(bytes32 scope, bytes32 role, address account) external view returns (Grant memory) {
        return _grants[_recordKey(scope, role, account)];
    }

    /// @notice The admin record as stored, whether or not it lives.
    function adminOf(bytes32 scope, bytes32 role, address account) external view returns (Admin memory) {
        return _admins[_recordKey(scope, role, account)];
    }

    /// @notice The binding as stored, whether or not it lives.
    function keyOf(bytes32 scope, bytes32 role, address account, bytes32 key)
        external
        view
        returns (Key memory)
    {
        return _keys[_keyKey(scope, role, account, key)];
    }

    /// @notice How many bindings the account has made since its epoch and not ended.
    function keyCountOf(address account) external view returns (uint16) {
        return _accounts[account].keys;
    }

    /// @notice What this grant alone gives now, and until when at most; 0, 0 if nothing. Pausing is ignored.
    function effective(bytes32 scope, bytes32 role, address account)
        public
        view
        returns (uint128 rights, uint40 expiry)
    {
        return _effective(_grants[_recordKey(scope, role, account)], scope, role, account);
    }

    /// @notice The rights of `account` in `scope` by its grants there and in ROOT; 0 while paused.
    function rightsOf(bytes32 scope, bytes32 role, address account) public view returns (uint128 rights) {
        if (paused) return 0;
        (rights,) = effective(scope, role, account);
        (uint128 everywhere,) = effective(ROOT, role, account);
        rights |= everywhere;
    }

    /// @notice Whether `account` has all of the rights `need`; never if `need` is 0.
    function can(bytes32 scope, bytes32 role, address account, uint128 need) external view returns (bool) {
        return need != 0 && rightsOf(scope, role, account) & need == need;
    }

    /// @notice The rights with which `key` acts for `account`; 0 while paused.
    function keyRightsOf(bytes32 scope, bytes32 role, address account, bytes32 key)
        external
        view
        returns (uint128 rights)
    {
        if (paused) return 0;
        return _keyRights(scope, role, account, key) | _keyRights(ROOT, role, account, key);
    }

    // --- Inside ------------------------------------------------------------------------------------------

    function _grant(GrantItem memory item) private {
        if (item.account == address(0)) revert ZeroAccount();
        if (item.role == ANY) revert ZeroRole();
        if (item.rights == 0) revert ZeroRights();
        _checkExpiry(item.notBefore, item.expiry);
        Grant storage g = _grants[_recordKey(item.scope, item.role, item.account)];
        bool stands = _stands(g, item.scope, item.role, item.account);
        address by;
        uint8 via;
        uint48 adminSerial;
        if (msg.sender != owner) {
            if (item.role == GUARDIAN) revert NotOwner(msg.sender);
            if (paused) revert IsPaused();
            (via, adminSerial) = _covering(item);
            by = msg.sender;
            if (stands && g.by != by) revert HeldByAnother(g.by);
        }
        uint48 n = _next();
        // A tenure goes on if it stands, and began after that of the record that it now hangs on.
        uint48 serial = stands && g.serial > adminSerial ? g.serial : n;
        g.notBefore = item.notBefore;
        g.expiry = item.expiry;
        g.serial = serial;
        g.rights = item.rights;
        g.by = by;
        g.via = via;
        _record(
            abi.encode(
                Granted.selector, n, item.account, item.scope, item.role, item.notBefore, item.expiry,
                item.rights, serial, by, via
            )
        );
    }

    /// The first admin record of the caller that covers `item`.
    function _covering(GrantItem memory item) private view returns (uint8 via, uint48 serial) {
        uint128 rights;
        uint40 expiry;
        uint8 end = item.scope == ROOT ? 2 : 4;
        for (; via < end; ++via) {
            (bytes32 scope, bytes32 role) = _source(item.scope, item.role, via);
            Admin storage a = _admins[_recordKey(scope, role, msg.sender)];
            if (!_lives(a, scope, msg.sender)) continue;
            (rights, expiry) = (a.rights, a.expiry);
            if (item.rights & ~rights == 0 && item.expiry <= expiry) return (via, a.serial);
        }
        if (expiry == 0) revert NotAdmin(item.scope, item.role, msg.sender);
        revert ExceedsAdmin(rights, expiry);
    }

    /// Scope and role of the admin record that `via` names.
    function _source(bytes32 scope, bytes32 role, uint8 via) private pure returns (bytes32, bytes32) {
        return (via & 2 == 0 ? scope : ROOT, via & 1 == 0 ? role : ANY);
    }

    function _revokeAll(address account) private {
        uint48 n = _next();
        _accounts[account] = Account(n, 0);
        _record(abi.encode(RevokedAll.selector, n, account, ROOT, msg.sender));
    }

    function _keyRights(bytes32 scope, bytes32 role, address account, bytes32 key)
        private
        view
        returns (uint128 rights)
    {
        Key storage k = _keys[_keyKey(scope, role, account, key)];
        Grant storage g = _grants[_recordKey(scope, role, account)];
        if (block.timestamp < k.expiry && k.serial > g.serial) {
            (rights,) = _effective(g, scope, role, account);
        }
    }

    function _effective(Grant storage g, bytes32 scope, bytes32 role, address account)
        private
        view
        returns (uint128 rights, uint40 expiry)
    {
        if (block.timestamp < g.notBefore || !_stands(g, scope, role, account)) return (0, 0);
        (rights, expiry) = (g.rights, g.expiry);
        if (g.by != address(0)) {
            (bytes32 s, bytes32 r) = _source(scope, role, g.via);
            Admin storage a = _admins[_recordKey(s, r, g.by)];
            rights &= a.rights;
            if (a.expiry < expiry) expiry = a.expiry;
        }
    }

    /// Whether the grant is in force, or will be from its notBefore on.
    function _stands(Grant storage g, bytes32 scope, bytes32 role, address account)
        private
        view
        returns (bool)
    {
        if (block.timestamp >= g.expiry || !_fresh(g.serial, scope, account)) return false;
        if (g.by == address(0)) return true;
        (bytes32 s, bytes32 r) = _source(scope, role, g.via);
        Admin storage a = _admins[_recordKey(s, r, g.by)];
        return a.serial < g.serial && _lives(a, s, g.by);
    }

    function _lives(Admin storage a, bytes32 scope, address account) private view returns (bool) {
        return block.timestamp < a.expiry && _fresh(a.serial, scope, account);
    }

    function _fresh(uint48 serial, bytes32 scope, address account) private view returns (bool) {
        return serial > _accounts[account].epoch && serial > _scopeEpochs[scope];
    }

    function _recordKey(bytes32 scope, bytes32 role, address account) private pure returns (bytes32) {
        return keccak256(abi.encode(scope, role, account));
    }

    function _keyKey(bytes32 scope, bytes32 role, address account, bytes32 key)
        private
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(scope, role, account, key));
    }

    function _checkOwner() private view {
        if (msg.sender != owner) revert NotOwner(msg.sender);
    }

    /// The owner or a guardian; a pause does not disarm a guardian.
    function _checkGuardian() private view {
        if (msg.sender == owner) return;
        (uint128 rights,) = effective(ROOT, GUARDIAN, msg.sender);
        if (rights == 0) revert NotGuardian(msg.sender);
    }

    function _checkBatch(uint256 items) private pure {
        if (items == 0 || items > MAX_BATCH) revert BadBatch(items);
    }

    function _checkExpiry(uint40 notBefore, uint40 expiry) private view {
        if (expiry <= block.timestamp) revert ExpiryTooEarly(expiry, block.timestamp);
        if (expiry <= notBefore) revert ExpiryTooEarly(expiry, notBefore);
        if (expiry > block.timestamp + MAX_TTL) revert ExpiryTooLate(expiry, block.timestamp + MAX_TTL);
    }

    function _next() private returns (uint48 n) {
        n = ++seq;
        changedAt = uint40(block.number);
    }

    /// Emits the event `e` = abi.encode(signature, seq, account, scope, data…) and folds it into `head`:
    /// both from the same bytes, so that the logs and `head` cannot disagree.
    function _record(bytes memory e) private {
        bytes32 before = head;
        bytes32 folded;
        assembly ("memory-safe") {
            let p := add(e, 32)
            log4(add(p, 128), sub(mload(e), 128), mload(p), mload(add(p, 32)), mload(add(p, 64)), mload(add(p, 96)))
            let leaf := keccak256(p, mload(e))
            mstore(0, before)
            mstore(32, leaf)
            folded := keccak256(0, 64)
        }
        head = folded;
    }
}
