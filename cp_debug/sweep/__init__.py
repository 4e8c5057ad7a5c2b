"""Grids of tasks over models, checkpoints, backends, samples and layers: one queue, a log, figures over samples."""
