"""The T5 encoder–decoder: configuration, parameter table, model, and the split of packed rows between its stacks."""
