"""Measurements as a command: `ramferry bench`. Figures are compared in pairs on one machine."""
