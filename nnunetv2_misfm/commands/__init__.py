"""The commands of the package, one file each: the only place that reads command lines."""
