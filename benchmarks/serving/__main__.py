"""`python -m benchmarks.serving` is the sweep, as it has always been."""

import sys

from .sweep import main

sys.exit(main())
