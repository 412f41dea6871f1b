"""Claims of the systems in `polyak.particles`."""
