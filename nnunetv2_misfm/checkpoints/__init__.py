"""What a checkpoint file holds, whoever has written it, and how ours are written."""
