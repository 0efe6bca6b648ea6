"""Stages: each turns one kind of artifact into the next. They take typed pieces, never the whole config."""
