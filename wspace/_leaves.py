"""Kinds of leaves that are no arrays: what is told apart by its class, without what computes it."""


class Factored:
    """Base of pytrees that stand for one leaf, so that nothing is combined factor by factor."""
