"""The unit of work, and the one function that ends it."""
