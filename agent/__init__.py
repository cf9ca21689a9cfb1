"""hostprobe's agent: from kernel figures to delivered lines."""

import os

# NumPy's linear algebra, which nothing here uses, else starts a thread for each CPU when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
