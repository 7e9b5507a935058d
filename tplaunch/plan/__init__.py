"""What a recipe will hold, move and cost on each rank, before anything is launched. Torch-free."""
