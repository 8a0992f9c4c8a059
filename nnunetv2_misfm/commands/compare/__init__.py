"""misfm_compare: does pretraining help on a user's own data? Arms trained on equal terms, and what came out."""
