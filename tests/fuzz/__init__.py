"""Fuzzers: inputs that nobody would think of, made by the thousand."""
