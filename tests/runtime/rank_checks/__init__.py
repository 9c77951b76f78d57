"""What ranks of `test_ranks` and `test_engines` do, several checks in one pair of warm processes."""
