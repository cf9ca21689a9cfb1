"""The tests of the package need root and Debian's tools: `make test-deb` runs them, `make test` does not."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if any("tests/deb" in argument for argument in sys.argv) else ["test_*.py"]
