"""The record of decisions: hash-chained, with checkpoints that members keep of each other."""
