"""Recipes: `schema` says what one is, `load` reads one from YAML."""
