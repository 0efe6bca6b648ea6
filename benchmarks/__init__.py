"""Speed claims, measured: both sides run in turn, at least five times, and are printed as a ratio with its spread."""
