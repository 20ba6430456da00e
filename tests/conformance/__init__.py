"""The same requests to a real QEMU and to ramferry; answers compared."""
