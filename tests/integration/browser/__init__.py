"""Pages in headless Chromium: the inspector's, and that of the demo shop."""

from __future__ import annotations
