"""Long-context tasks: seeded generators of prompts whose answer is known, and their scores.

Numpy alone, never a model; a tokenizer is passed in and only counts. See ``registry.TASKS``.
"""
