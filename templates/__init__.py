"""The configuration templates, as they are loaded and as `hostprobe sample-config` prints them."""

TEMPLATES = ("minimal", "standard", "full")
