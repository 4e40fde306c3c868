"""The worker: a supervisor that claims and writes, and a trainer that computes and never sees the database."""
