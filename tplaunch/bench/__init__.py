"""Measures what a recipe's steps take on this machine, and what the machine can do."""
