"""Whether two answers are equal as mathematics, decided in processes that are killed when they take too long."""
