"""Speed: the operations and whole models compared with what a user would pick instead, measured in one run.

Every row checks that the results agree before its figures are reported, and carries what a figure must: commit,
processor, instruction set, threads, versions, shapes.
"""
