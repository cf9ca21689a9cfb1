"""One file per subject: each probe reads a part of the host and fills its tables."""
