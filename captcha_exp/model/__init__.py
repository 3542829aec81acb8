"""The model: networks, training step and train state, evaluation and prediction.

Nothing is imported here, because importing torch takes seconds.

- `networks`: networks and heads, and `build`, which selects them
- `optim`: optimizers, learning rate schedule, loss scale
- `step`, `state`: one training step; everything that changes during a training, and its checkpoints
- `weights`: the weights file
- `evaluate`, `predict`: accuracy on a split; the text in image files
"""
