"""Making score maps: sources of images, the dense annotator, one shard's work, the run."""
