"""Nothing asserts how long something takes: hypothesis has no deadline, and draws the same examples every time."""

from hypothesis import settings

settings.register_profile("dramatis", deadline=None, derandomize=True)
settings.load_profile("dramatis")
