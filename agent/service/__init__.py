"""`hostprobe service`: the systemd service for hosts without a package, and how a running agent does."""
