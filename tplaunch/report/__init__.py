"""Runs seen from outside: listed, compared, drawn, reported. Needs no torch; reads what lies in run directories."""
