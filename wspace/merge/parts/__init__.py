"""The parts that merges are made of: what stays of a task vector, and what several agree on."""
