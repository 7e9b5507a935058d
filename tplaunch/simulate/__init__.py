"""The real trainer for one rank of any world, without that world: no weights, no data, no peers."""
