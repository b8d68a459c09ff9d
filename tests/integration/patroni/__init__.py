"""What happens to requests when PostgreSQL fails over: Patroni, etcd, HAProxy."""
