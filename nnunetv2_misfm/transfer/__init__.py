"""A checkpoint to another network: the file format, the transfer itself and the fine-tuning plans."""
