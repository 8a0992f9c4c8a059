"""What is true of every plans file, whichever journey wrote it."""
