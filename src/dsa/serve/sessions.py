"""Sessions that were used stay in memory, so that the next request reads only what is new in it.

A session belongs to its owner: another owner's request never takes it, whatever it has in common with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsa.generation.session import Session, common_prefix


class Sessions:
    """See the module. Only the inference thread uses it.

    Attributes:
        most: How many there are at most, those in use included.
    """

    def __init__(self, make: Callable[[str], Session], most: int) -> None:
        """
        Args:
            make: Makes an empty session for an owner.
            most: See above.
        """
        self.most = most
        self._make = make
        # The least recently used first.
        self._idle: list[tuple[str, Session]] = []
        self._used: list[Session] = []

    def __len__(self) -> int:
        return len(self._idle) + len(self._used)

    @property
    def is_full(self) -> bool:
        """Whether all are in use."""
        return len(self._used) >= self.most

    def take(self, owner: str, ids: Sequence[int]) -> Session:
        """The owner's session that begins with the most of these tokens, or an empty one.

        One that would lose more than it gives is left for others.
        """
        assert not self.is_full
        best, most = -1, 0
        for place, (whose, session) in enumerate(self._idle):
            common = common_prefix(session.token_ids, ids) if whose == owner else 0
            if common > most and 2 * common >= len(session.token_ids):
                best, most = place, common
        if best >= 0:
            session = self._idle.pop(best)[1]
        else:
            if len(self) >= self.most:
                self.drop_oldest()
            session = self._make(owner)
        self._used.append(session)
        return session

    def give_back(self, owner: str, session: Session) -> None:
        """It may be taken again."""
        self._used.remove(session)
        if session.token_ids:
            self._idle.append((owner, session))

    def drop_oldest(self) -> bool:
        """Lets go of the least recently used one that nobody uses; says whether there was one."""
        if not self._idle:
            return False
        self._idle.pop(0)
        return True

    def forget(self, owner: str, document: str) -> None:
        """Lets go of an owner's sessions with this document."""
        self._idle = [each for each in self._idle if not (each[0] == owner and each[1].document == document)]

    def held(self) -> int:
        """Tokens in all of them."""
        return sum(len(session.token_ids) for _, session in self._idle) + sum(
            len(session.token_ids) for session in self._used
        )
