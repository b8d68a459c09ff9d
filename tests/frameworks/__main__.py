"""`python -m tests.frameworks`: what holds with which framework, on which server."""

from __future__ import annotations

import logging
import sys

from tests.frameworks.matrix import main

logging.disable()  # failed commits are expected here
sys.exit(main())
