"""Image classifiers for the experiments of model edits: their data, training, poisoning and judging."""
