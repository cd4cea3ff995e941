"""Runnable examples: data sets, plain models and programs that use the library the way a project would."""
