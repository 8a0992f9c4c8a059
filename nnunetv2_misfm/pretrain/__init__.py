"""What a pretraining run learns from: crops of a pool, augmentation and the pretext tasks."""
