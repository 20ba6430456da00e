"""QMP, as QEMU speaks it: JSON framing, sessions with their negotiation, commands, events."""
