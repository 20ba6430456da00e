"""Who else maps a file, by /proc/PID/maps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine.guest.sharers import others_mapping

MAPS = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_only_who_maps_the_file_is_found_and_not_who_maps_one_with_such_a_name(
    tmp_path: Path,
) -> None:
    wanted = tmp_path / "wanted"
    wanted.write_bytes(bytes(4096))
    file = wanted.stat()
    where = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x} {file.st_ino}"
    liar = tmp_path / f"00000000 {where} liar"
    liar.write_bytes(bytes(4096))
    children = []
    try:
        for path in (wanted, liar):
            child = subprocess.Popen(
                [sys.executable, "-c", MAPS, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() == b"mapped\n"

        found = others_mapping({(file.st_dev, file.st_ino)}, 0)

        assert found == [children[0].pid]
    finally:
        for child in children:
            child.kill()
            child.communicate()
