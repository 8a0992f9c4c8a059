"""misfm_demo: the whole job on volumes it makes itself."""
