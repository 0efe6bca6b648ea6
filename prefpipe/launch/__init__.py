"""Sweeps and what becomes of them: Slurm jobs, attempts, status, retry."""
