"""Facts about the whole: the promises P1 to P17."""
