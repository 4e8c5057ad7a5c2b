"""Data sets: point clouds with ground truth, from info files, folders and the synthetic scenes."""
