"""Sweeps: plan the jobs of a multirun, run each in a fresh process, and summarize the results."""
