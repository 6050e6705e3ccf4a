"""What grants mean, in as few words as possible: the reference that the broker is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

METHODS = ("put", "get")


@dataclass
class Node:
    """A grant: what it adds, and what hangs on it."""

    owner: str
    at: str  # the node that issued it
    parents: list[Node] = field(default_factory=list)
    methods: frozenset[str] = frozenset(METHODS)
    prefix: str = ""
    calls: int | None = None
    expires: float = float("inf")
    uses: int | None = None
    kind: str = "attenuated"
    ended: bool = False  # revoked: dead for good, and all below it
    closed: bool = False  # its session is over: nobody speaks through it any more
    children: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        for parent in self.parents:
            parent.children.append(self)

    def above(self) -> Iterator[Node]:
        """Itself and all its ancestors."""
        seen: list[Node] = []
        todo = [self]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.append(node)
                yield node
                todo += node.parents

    def below(self) -> Iterator[Node]:
        """Itself and all its descendants."""
        yield self
        for child in self.children:
            yield from child.below()

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Model:
    """All grants of all nodes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.roots: dict[tuple[str, str], Node] = {}

    def root(self, user: str, at: str) -> Node:
        """The root of a user's role at a node."""
        root = self.roots.get((user, at))
        if root is None or root.ended:
            root = self.roots[user, at] = Node(user, at, kind="role")
        return root

    def works(self, node: Node) -> bool:
        """Whether somebody who holds it can speak through it."""
        return not node.closed and all(not a.ended and self.now < a.expires for a in node.above())

    def call(self, node: Node, method: str, key: str) -> bool:
        """Whether a call is allowed; it is charged if it is."""
        above = list(node.above())
        allowed = self.works(node) and all(
            method in a.methods and key.startswith(a.prefix) and a.calls != 0 for a in above
        )
        if allowed:
            for a in above:
                a.calls = None if a.calls is None else a.calls - 1
        return allowed

    def redeem(self, share: Node) -> bool:
        """Whether a share gives a session now; a use is spent if it does."""
        if not self.works(share) or share.uses == 0:
            return False
        share.uses = None if share.uses is None else share.uses - 1
        return True

    def close(self, node: Node) -> None:
        """A session ends by itself: what is durable below it lives on."""
        node.closed = True
        for child in node.children:
            if child.kind != "share":
                self.close(child)

    def revoke(self, node: Node) -> None:
        """It and all below it are dead."""
        for below in node.below():
            below.ended = True

    def withdraw(self, user: str) -> None:
        """A user loses the role everywhere."""
        for (who, _), root in self.roots.items():
            if who == user:
                self.revoke(root)

    def restart(self, at: str) -> None:
        """A node stops and starts: sessions of it end."""
        for (_, where), root in list(self.roots.items()):
            if where == at:
                for child in root.children:
                    self.close(child)
                for below in root.below():
                    if below.kind == "share":
                        for use in below.children:
                            if use.kind != "share":
                                self.close(use)
