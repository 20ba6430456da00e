"""RAM images, the same on every run, for engines that must move the same bytes.

Kinds change in runs of geometric length (mean 32 pages): buddy allocators hand out small blocks, so
real RAM is neither sorted by kind nor shuffled page by page. Zero pages are written, not holes: a
guest that has run has touched them.
"""

from __future__ import annotations

import mmap
import sysconfig
from collections.abc import Collection
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

PAGE: Final = 4096
SHARED_MEMORY: Final = Path("/dev/shm")
RUN_PAGES_MEAN: Final = 32
PIECE_PAGES: Final = 4096  #: written at once: 16 MiB
FILES_BYTES_MAX: Final = 32 * 1024 * 1024

#: Share of each kind.
KINDS: Final = {
    "mixed": {"zero": 0.4, "files": 0.3, "heap": 0.2, "random": 0.1},
    "random": {"random": 1.0},
    "text": {"text": 1.0},
    "heap": {"heap": 1.0},
}
#: Pages of files: of all that a program maps, or of text only.
FILES: Final = {"files": (".py", ".so", ".pyc"), "text": (".py",)}
Pages = npt.NDArray[np.uint8]


def _files(suffixes: Collection[str]) -> Pages:
    """Bytes of the Python library's own files, in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    content = bytearray()
    for path in sorted(library.rglob("*")):
        if path.suffix in suffixes and path.is_file():
            content += path.read_bytes()
            if len(content) >= FILES_BYTES_MAX:
                break
    whole = len(content) // PAGE * PAGE
    return np.frombuffer(bytes(content[:whole]), dtype=np.uint8).reshape(-1, PAGE)


def _heap(random: np.random.Generator, count: int) -> Pages:
    """Pointers into one heap, small integers and zeros, as object-heavy programs leave them."""
    words = random.integers(0, 3, (count, PAGE // 8), dtype=np.uint64)
    pointers = np.uint64(0x00007F5A00000000) + random.integers(
        0, 2**24, words.shape, dtype=np.uint64
    ) * np.uint64(16)
    small = random.integers(0, 1000, words.shape, dtype=np.uint64)
    chosen = np.where(words == 0, np.uint64(0), np.where(words == 1, small, pointers))
    return chosen.view(np.uint8).reshape(count, PAGE)


def kinds_of_pages(kind: str, count: int, seed: int) -> list[str]:
    """The kind of each page."""
    random = np.random.default_rng(seed)
    names, shares = zip(*KINDS[kind].items(), strict=True)
    pages: list[str] = []
    while len(pages) < count:
        name = names[int(random.choice(len(names), p=shares))]
        pages += [name] * int(random.geometric(1 / RUN_PAGES_MEAN))
    return pages[:count]


def write_image(path: Path, size: int, kind: str, seed: int = 1) -> None:
    """Write an image of `size` bytes (whole pages) of a kind of `KINDS`."""
    random = np.random.default_rng(seed)
    count = size // PAGE
    files = {name: _files(FILES[name]) for name in KINDS[kind].keys() & FILES.keys()}
    kinds = np.array(kinds_of_pages(kind, count, seed))
    with path.open("w+b") as file:
        file.truncate(size)
        image = mmap.mmap(file.fileno(), size)  # hugetlbfs has no write()
    with image:
        for first in range(0, count, PIECE_PAGES):
            piece = kinds[first : first + PIECE_PAGES]
            pages = np.zeros((len(piece), PAGE), dtype=np.uint8)
            for name, number in zip(*np.unique(piece, return_counts=True), strict=True):
                if name in files:
                    pages[piece == name] = files[name][random.integers(0, len(files[name]), number)]
                elif name == "heap":
                    pages[piece == name] = _heap(random, int(number))
                elif name == "random":
                    pages[piece == name] = random.integers(0, 256, (number, PAGE), dtype=np.uint8)
            image[first * PAGE : first * PAGE + pages.nbytes] = pages.tobytes()
