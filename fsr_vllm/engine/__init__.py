"""The vLLM side: placeholders and cache identity (processor), selection (adapter), model families,
workers.
"""
