"""The vLLM side: placeholders and cache keys in the front end, rows in the worker."""
