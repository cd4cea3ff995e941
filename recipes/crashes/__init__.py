"""The parts of recipes/crash_safety.py: fits that keep a diary, and the examination of their stores."""
