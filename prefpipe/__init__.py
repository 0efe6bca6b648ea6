"""Preference optimization of language models, from prompts to an evaluated checkpoint."""

__version__ = "0.1.0"
