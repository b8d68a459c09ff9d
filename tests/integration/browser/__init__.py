"""Pages in headless Chromium: the inspector, the demo shop, the documentation."""

from __future__ import annotations
