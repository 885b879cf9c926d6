"""What is predicted when.

`ranks` draws a group rank for each token, `curriculum` says which ranks at which step, and
`intervals` sorts a row by rank, so that what a row may see becomes one interval of keys.
"""
