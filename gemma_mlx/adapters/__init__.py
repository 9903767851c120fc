"""Adapters of several programs: read, attach, exchange, combine, merge."""
