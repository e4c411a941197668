"""Engines: who runs a plan's steps, and where. There is one: this process, step after step."""
