"""The inner step: differentiable copies of a module, how far it moves, and passes that are differentiated twice."""
