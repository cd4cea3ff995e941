"""Case deletion on texts: the explained fits, the methods, the deletions and what retraining without them says."""
