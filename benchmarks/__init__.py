"""Speed claims, measured: both sides in one process run, interleaved, at least five times, printed as a ratio."""
