"""Migration as one stream of bytes over one descriptor: `fd:`, `exec:`, `file:` and `vsock:`.

Control begins the stream, lends its descriptor to one worker for the rounds, and ends it
(docs/decisions/0004-one-stream.md; the bytes are in engine/wire/stream.py).
"""
