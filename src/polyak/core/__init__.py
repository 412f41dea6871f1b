"""What every room shares: argument checks, recurrences of momentum and averaging, one-step integrators, schedules."""
