"""Dataset builders that all yield one common record, and the texts that go with them."""
