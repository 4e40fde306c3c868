"""What policies were after so many updates."""
