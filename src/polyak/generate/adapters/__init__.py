"""Adapters to other libraries: one module for each, imported only where it is used."""
