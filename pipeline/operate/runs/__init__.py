"""What runs leave behind, read by whoever looks at them: while they go on, after they ended, or were killed.

numbers, credentials, encoded -> find -> run -> state.
"""
