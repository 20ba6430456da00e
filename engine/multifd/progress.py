"""Counters that a worker writes and control reads, without messages: one page of 64-bit words each.

A word has one writer, its worker; readers may see counters that are microseconds apart from each
other.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from typing import Final

from engine import _native
from engine.memory.words import SharedWords
from engine.wire import CodecId


class Count(enum.IntEnum):
    """Word index in the page. All are totals of the worker's life within one migration."""

    PACKETS = 0
    WIRE_BYTES = 1  #: headers and payload, as handed to or taken from ZeroMQ
    PAYLOAD_BYTES = 2
    PAGES = 3  #: non-zero pages
    ZERO_PAGES = 4
    GATHERED_PAGES = 5  #: copied before sending, the others were lent
    FRESH_PAGES = 6  #: placed by UFFDIO_COPY; behind a guest that runs, also new zero pages
    STALLED_NS = 7  #: waiting for the channel to drain
    PACED_NS = 8  #: waiting for bandwidth
    STRANGERS = 9  #: messages dropped because they were not the peer's
    HARVEST_NS = 10  #: how long the last harvest took
    HARVEST_PAGES = 11  #: looked at by harvests so far: moves as long as one is under way
    TRIED_BYTES = 12  #: given to codecs, whether it helped or not
    PLAIN_BYTES = 13  #: that a codec made shorter, before
    ENCODED_BYTES = 14  #: and after
    ENCODE_NS = 15  #: of this worker's CPU time, making packets
    CODEC = 16  #: `CodecId` of the newest batch's choice
    LEVEL = 17  #: and its level, as a two's complement
    DELTA_BYTES = 18  #: of XBZRLE; this and the next as `xbzrle-cache` counts them
    DELTA_HITS = 19
    DELTA_MISSES = 20
    DELTA_OVERFLOWS = 21
    DELTA_UNCHANGED = 22  #: pages that the destination had as they were
    ELIDED_PAGES = 23  #: not sent again, for the destination has them as they are
    BATCHES = 24  #: batches by choice: word BATCHES + CodecId
    ACCOUNT = 64  #: from here on: what `auto` knows (`engine.compress.account`)


class Progress(SharedWords):
    """One worker's page."""

    def __getitem__(self, count: Count) -> int:
        return self.words[count]

    def batches(self, codec: CodecId) -> int:
        """How many batches got this codec, whether it helped or not."""
        return self.words[Count.BATCHES + codec]

    def chosen(self, codec: CodecId, level: int) -> None:
        """The next batch gets this codec. Only the worker that owns the page calls this."""
        self.words[Count.BATCHES + codec] += 1
        self.words[Count.CODEC], self.words[Count.LEVEL] = codec, level % 2**64

    def account(self, words: Sequence[int]) -> None:
        """Show what the policy knows. Only the worker that owns the page calls this."""
        for index, word in enumerate(words):
            self.words[Count.ACCOUNT + index] = word

    def account_words(self, count: int) -> list[int]:
        """The first words that `account` showed."""
        return self.words[Count.ACCOUNT : Count.ACCOUNT + count].tolist()

    def add(self, count: Count, amount: int) -> None:
        """Only the worker that owns the page calls this."""
        self.words[count] += amount

    def put(self, count: Count, value: int) -> None:
        """Only the worker that owns the page calls this."""
        self.words[count] = value


class Budget(SharedWords):
    """The bandwidth budget that all senders take from; control owns it and sets its rate.

    Three words: bytes per second (0: unlimited), the time up to which bandwidth is sold, and the
    generation of the rate. After them, what each sender has used of the CPUs.
    """

    #: A page has 512 words, and there are at most 255 channels.
    CPU_WORDS: Final = 8

    @property
    def rate_bytes_per_s(self) -> int:
        return self.words[0]

    @rate_bytes_per_s.setter
    def rate_bytes_per_s(self, rate: int) -> None:
        """Only control calls this. What was sold at the old rate does not hold the new one back."""
        _native.budget_set_rate(self.mapping, min(rate, 2**63 - 1), time.monotonic_ns())

    @property
    def generation(self) -> int:
        """Counts the rates; what was bought before it changed must be bought again."""
        return self.words[2]

    def used_cpu(self, index: int, cpu_ns: int) -> None:
        """Sender `index` has used so much CPU time."""
        self.words[self.CPU_WORDS + index] = cpu_ns

    @property
    def cpu_ns(self) -> int:
        """CPU time that all senders have used."""
        return sum(self.words[self.CPU_WORDS :])

    def take(self, byte_count: int, now_ns: int, burst_ns: int) -> int:
        """Buy bandwidth; return the monotonic time when the bytes may go."""
        return _native.budget_take(self.mapping, byte_count, now_ns, burst_ns)
