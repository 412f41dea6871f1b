"""The optimizer engine: an elementwise update rule is written once, and run by whichever backend is fastest where it runs."""

from polyak.optim._engine.base import RuleOptimizer

__all__ = ["RuleOptimizer"]
