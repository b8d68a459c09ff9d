"""The library among others: frameworks, servers, job queues, clusters."""
