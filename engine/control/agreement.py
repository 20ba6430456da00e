"""What source and destination agreed on about the channels between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    """What senders need to know.

    :ivar endpoints: one for each channel.
    :ivar codecs: ids of those that the destination can decode, or must.
    :ivar placement: how the destination places pages, if it said so.
    :ivar stream_fd: of a stream, lent to its only sender; else -1.
    :ivar is_acknowledged: the destination says which rounds it has placed."""

    endpoints: list[str]
    codecs: tuple[int, ...]
    placement: str = ""
    stream_fd: int = -1
    is_acknowledged: bool = True
