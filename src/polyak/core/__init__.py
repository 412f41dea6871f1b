"""What all rooms build on: argument checks, recurrences of momentum and averaging, one-step integrators, schedules."""
