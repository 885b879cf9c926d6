"""What is asked, and how the answers are graded; no model is opened here.

`catalogue` lists the tasks, `files` reads their rows, `profiles` says by which protocol `examples` turns rows
into requests; `grading` and `metrics` turn answers into figures, code by way of `code_sandbox`; `perplexity`
is about texts that a model writes.
"""
