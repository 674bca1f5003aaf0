"""Functions on tensors, no modules: one folder an op, one contract an op, several backends each."""
