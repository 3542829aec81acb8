"""How much memory of a GPU a training takes, foretold without one: a model of the CUDA caching allocator
(`allocator`), to which a traced step is played."""
