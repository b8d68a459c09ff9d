"""What is told to observers, trackers and the log."""
