"""What a recipe cannot do, or probably did not mean: found before anything starts. Imports no torch."""
