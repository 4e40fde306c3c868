"""What policies learn in."""
