"""Training jobs: their states, their events and their metrics."""
