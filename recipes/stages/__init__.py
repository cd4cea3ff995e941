"""Two training runs, one after the other: a network is pretrained on one task and finetuned on another."""
