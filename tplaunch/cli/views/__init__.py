"""What commands print, as text. No arithmetic here: what is shown was worked out elsewhere."""
