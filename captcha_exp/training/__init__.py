"""Training: the loop and the steps before and after it.

Nothing is imported here, because importing torch takes seconds.

- `train`: `train` starts a run, `resume` continues one, `fit` is the loop
- `recorder`: the record of a run, in its directory first, then by its tracker
- `checkpointer`: when to save a checkpoint and when to stop
- `sanity`, `progress`: checks of a training with likely causes; the progress of an epoch
- `autotune`, `oom`: a check of the precision, and the batch size by trials; running out of memory as a result
"""
