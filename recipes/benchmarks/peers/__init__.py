"""Other libraries, each in its own room: asked the questions that this library answers, and measured beside it."""
