"""What the masks of a grammar and of a request have taken, and may take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

#: Processor time that the masks of a request may take: so many seconds, and so many more for each mask. A mask of a
#: usual form takes 0.02 to 1 ms.
REQUEST_S, MASK_S = 10.0, 0.005


class MaskGroup:
    """Sequences whose masks are not computed at the same time, because their matchers wait for each other."""

    def __init__(self) -> None:
        self.works: deque[Callable[[], None]] = deque()
        #: How many masks have been asked for and are not there, and whether a thread computes one.
        self.pending, self.active = 0, False
        #: Whether the last step that needed its masks did not wait for them.
        self.slow = False
        #: Seconds that its masks have taken so far.
        self.spent_s = 0.0


class MaskBudget:
    """The time that the masks of a request may take. Its sequences fail together.

    Args:
        field: that is named if they take more.
    """

    def __init__(self, field: str = "structured_outputs") -> None:
        #: Of its sequences if they have no grammar, which others could share.
        self.group = MaskGroup()
        #: Why no mask can be computed; empty if one can.
        self.error = ""
        self._field, self._left_s = field, REQUEST_S

    def spend(self, seconds: float) -> None:
        """Count the processor time of a mask."""
        self._left_s += MASK_S - seconds
        if self._left_s < 0:
            self.exceed()

    def exceed(self) -> None:
        """Let the request fail."""
        self.error = f"{self._field}: following the text by this grammar takes more time or memory than is allowed"
