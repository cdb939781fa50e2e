"""A float file in int8: the ladder of ways, the gate that each must pass, training that may come before."""
