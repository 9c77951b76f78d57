"""What runs leave behind, read by whoever looks at them: while they go on, after they ended, or were killed.

record -> numbers, credentials, encoded -> find -> run -> state.
"""
