"""How fast qaa is next to its rivals: ``python -m benchmarks``, or ``pytest benchmarks --benchmark-only``."""
