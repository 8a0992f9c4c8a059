"""The weights of a checkpoint into another network: the transfer itself and the fine-tuning plans."""
