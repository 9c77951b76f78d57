"""`lathe watch`: runs in a terminal while they go on.

watched -> figures -> screen, job.
"""
