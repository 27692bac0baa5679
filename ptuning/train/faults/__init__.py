"""Steps and runs that go wrong: guards, and how each end is told."""
