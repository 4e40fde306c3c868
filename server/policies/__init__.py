"""What is trained and asked for actions."""
