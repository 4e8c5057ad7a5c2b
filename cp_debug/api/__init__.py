"""Functions for Python programs: every kind of model in one calling shape.

The root of the package exports them flat.
"""
