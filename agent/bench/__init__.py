"""What the agent costs on this host: `hostprobe bench`."""
