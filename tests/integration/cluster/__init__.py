"""What happens on a primary and its replicas."""
