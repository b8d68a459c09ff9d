"""Whether the tests notice a change of the lines that decide, commit and call hooks.

`python -m tests.mutation FOLDER` changes these lines one by one with mutmut, in a copy
that it makes in the folder, and runs the tests of `[tool.mutmut]` on each mutant.
"""
