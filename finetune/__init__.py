"""Finetuning: data becomes adapters, adapters become checkpoints."""
