"""How much memory of a GPU a training takes, foretold without one: what it allocates, traced on tensors
without numbers (`trace`), is played to a model of the CUDA caching allocator (`allocator`)."""
