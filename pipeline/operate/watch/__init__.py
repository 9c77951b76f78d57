"""`lathe watch`: runs in a terminal while they go on.

figures -> watched -> screen, job.
"""
