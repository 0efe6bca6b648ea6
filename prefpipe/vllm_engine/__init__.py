"""vLLM in processes of its own: what runs there (worker.py, calculator.py), and how it is spoken to (client.py)."""
