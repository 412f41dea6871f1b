"""Comparing optimizers or samplers on a user's own problem: which helps, by how much, and how sure is that?

>>> from polyak.lab import compare
>>> result = compare("my_task.py", "adamw,adan,lion", budget="5m", seeds=5)
>>> print(result.answer)

The lab's engine does the work (workers, store, resuming, statistics): a comparison is an experiment of its kind, which nobody has
claimed anything about. What is new is here: the user's file (``task``, ``examine``), arms from words (``arms``), tuning that is
asked of Optuna (``search``), the trials themselves (``trial``, ``sampling``), what is said of it all (``result``, ``page``), and
what the store keeps of it (``record``).
"""
