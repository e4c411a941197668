"""Probes: arrays become directions, and directions are kept with what they were made from."""
