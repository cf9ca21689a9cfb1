"""Where payloads go: one file per transport."""
