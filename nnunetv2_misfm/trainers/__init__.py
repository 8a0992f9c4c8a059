"""The two nnU-Net trainers and what they share."""

from nnunetv2_misfm.errors import tell_uncaught_errors_in_one_line

# Here, not where nnU-Net looks for trainers: it finds those that users derive from ours in folders of theirs.
tell_uncaught_errors_in_one_line()
