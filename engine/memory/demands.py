"""Where the guest is: the page service writes it down, background senders go on there."""

from __future__ import annotations

from typing import Final

from engine.memory.words import SharedWords

LAST_DEMAND: Final = 7  #: word of the page service's statistics; of native/page_service.h, too


class NewestDemand(SharedWords):
    """The one word of that page that is more than a counter."""

    @property
    def last_demand(self) -> tuple[int, int] | None:
        """(block index, page) of the newest demand: around it the background may go on."""
        word = self.words[LAST_DEMAND]
        return ((word - 1) >> 32, (word - 1) & 0xFFFFFFFF) if word else None
