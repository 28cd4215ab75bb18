"""Runnable examples of apmem2. Each one is run by the tests."""
