"""Processes: programs that hold exactly the capabilities that they were given."""
