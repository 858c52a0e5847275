"""The command line: what its words mean, what is done, and what is said of it.

Words become a recipe, a recipe is checked and carried out as a job. What only parses words does
not import JAX, so that help and mistakes are answered at once.
"""
