"""What retrained models really say, and how well an attribution foretold it."""
