"""The page service's end of a new fault channel, and a peer that is in no hurry."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from engine import wire
from engine.postcopy import channel
from engine.postcopy.channel import connect
from tests.postcopy.rig import SESSION
from tests.postcopy.support import frame

WAIT_S = 1.0


def test_a_peer_that_dribbles_its_answer_has_as_long_as_one_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "CONNECT_WAIT_S", WAIT_S)
    opened, is_over = frame(wire.FaultKind.OPENED, 1, 7), threading.Event()

    def dribble() -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in opened:
                if is_over.wait(WAIT_S / 4):
                    break
                connection.send(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=dribble)
        peer.start()
        try:
            began = time.monotonic()
            with pytest.raises(ConnectionError, match="timed out"):
                connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", SESSION, 7)
            assert time.monotonic() - began < len(opened) * WAIT_S / 8  # half of what it dribbles
        finally:
            is_over.set()
            peer.join()
