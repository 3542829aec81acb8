"""Sweeps: plan the jobs of a multirun, run each in its own process, and summarize the results.

- `record`: the jobs and the sweep directory with its sweep.json
- `planner`: the predicted memory of each job, and the record of a job that is skipped
- `runner`: the whole sweep, from its parent run in MLflow to its summary
- `supervisor`, `worker`: the parent and the worker process of a job; `workers` starts it
- `results`, `aggregate`: the result of each job, and means over jobs that differ only in their seeds
- `summary`: all results together, by `conclusions` (sentences), `tables` and `figure`

A sweep on the command line starts in `cli.sweep`.
"""
