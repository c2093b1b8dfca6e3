"""What was measured, for people to look at."""
