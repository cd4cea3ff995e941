"""A small language model and a classifier on the same encoder: pretraining and finetuning on text."""
