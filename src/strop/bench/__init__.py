"""Measures a model on this machine: against the machine's limit, and beside other engines."""
