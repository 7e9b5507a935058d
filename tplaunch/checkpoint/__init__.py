"""Checkpoints: `store` is the directory format (torch-free), `manager` saves and loads through DCP."""
