"""Settings of property-based tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None)  # a busy machine is not a slow function
settings.load_profile("steady")
