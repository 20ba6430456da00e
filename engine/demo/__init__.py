"""`ramferry demo`: a guest that keeps writing is migrated between two processes on this machine."""

from engine.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
