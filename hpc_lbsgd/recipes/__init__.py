"""Recipes that come with the package, one YAML file each; no code. Read by name: reading.py.

May be imported by: reading, recipe.
May import: nothing.
"""
