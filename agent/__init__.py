"""hostprobe's agent: from kernel figures to delivered lines."""

__version__ = "0.1.0"
