"""`ramferry monitor`: the human monitor of a running `ramferry serve`, for people and scripts."""

from engine.monitor.run import run_commands, run_interactive

__all__ = ["run_commands", "run_interactive"]
