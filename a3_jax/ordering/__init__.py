"""What is predicted when.

`ranks` draws a group rank for each token, `contexts` what is given before and what is left out (both on
the arithmetic of `segments`), `curriculum` says which of them at which step, and `intervals` sorts a row by
rank, so that what a row may see becomes one interval of keys.
"""
