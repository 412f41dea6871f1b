"""The pictures of systems: each a function that draws what a method does, from the part itself, in seconds.

A claim names its picture. These files import light, as claims do; they decide no result.
"""
