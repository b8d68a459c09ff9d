"""The kit for tests of applications: a sandbox, faults, what is to be seen."""
