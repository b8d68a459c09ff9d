"""Where a unit begins: a request, a block, the root functions."""
